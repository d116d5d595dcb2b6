"""The recurrence, token after token, in fp32, the state rounded to its own dtype after each."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvfp4_kernels.formats.philox import WORD, block_bytes


def refuses(*arguments) -> str | None:
    return None


@torch.no_grad()
def run(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    intermediate: Tensor | None,
    noise: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads = x.shape[2]
    step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias
    step = (torch.logaddexp(step, torch.zeros_like(step)) if dt_softplus else step).clamp(low, high)
    B, C = (t.to(wide).repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    slots = torch.arange(x.shape[0], device=x.device) if indices is None else indices.long()
    current, ys = state[slots.clamp(min=0)], []
    for t in range(x.shape[1]):
        u = (step[:, t, :, None] * x[:, t].to(wide))[..., None] * B[:, t, :, None, :]
        after = torch.exp(A.to(wide) * step[:, t])[..., None, None] * current.to(wide) + u
        current = after.to(state.dtype) if noise is None else stochastic(after, state.dtype, noise, t)
        if intermediate is not None:
            intermediate[:, t] = current
        ys.append(torch.matmul(after, C[:, t, :, :, None]).squeeze(-1))
    y = torch.stack(ys, 1) if ys else x.new_empty(x.shape, dtype=wide)
    if D is not None:
        y = y + x.to(wide) * (D if D.dim() == 2 else D[:, None])
    y = y if z is None else y * F.silu(z.to(wide))
    if intermediate is None:
        used = slots >= 0
        state[slots[used]] = current[used]
    return y.masked_fill((slots < 0)[:, None, None, None], 0).to(x.dtype)


def stochastic(v: Tensor, dtype: torch.dtype, noise: Tensor, advance: int) -> Tensor:
    """v, fp32, to bf16 or fp16: element e takes halfword e % 8 of draw e // 8 (op.py has the rule). NaN and Inf stay."""
    pairs = block_bytes((v.numel() + 7) // 8, noise, advance).long().view(-1, 2)
    halves = (pairs[:, 0] | pairs[:, 1] << 8)[: v.numel()].view(v.shape)
    dropped = 16 if dtype == torch.bfloat16 else 13
    bits = v.contiguous().view(torch.int32).long() & WORD
    rounded = _as_float((bits + (halves >> (16 - dropped))) >> dropped << dropped)
    if dtype == torch.float16:  # below 2^-14 the last place is 2^-24, whatever the exponent
        small = torch.floor(v.abs() * 2.0**24 + halves.float() * 2.0**-16) * 2.0**-24
        rounded = torch.where(v.abs() < 2.0**-14, torch.copysign(small, v), rounded)
    return torch.where(v.isfinite(), rounded, v).to(dtype)


def _as_float(bits: Tensor) -> Tensor:
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)

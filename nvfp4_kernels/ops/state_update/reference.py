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
    A, D, dt_bias = (None if v is None else v.to(wide) for v in (A, D, dt_bias))
    slots = torch.arange(x.shape[0], device=x.device) if indices is None else indices.long()
    current, y = state[slots.clamp(min=0)], x.new_empty(x.shape)
    for t in range(x.shape[1]):
        given = (None if v is None else v[:, t].to(wide).contiguous() for v in (x, dt, B, C, z))
        after, made = _token(current.to(wide), *given, A, D, dt_bias, dt_softplus, low, high)
        current = after.to(state.dtype) if noise is None else stochastic(after, state.dtype, noise, t)
        if intermediate is not None:
            intermediate[:, t] = current
        y[:, t] = made.masked_fill((slots < 0)[:, None, None], 0)
    if intermediate is None:
        used = slots >= 0
        state[slots[used]] = current[used]
    return y


def _token(state, x, dt, B, C, z, A, D, dt_bias, dt_softplus, low, high) -> tuple[Tensor, Tensor]:
    """The state after a token, and y. The tensors of the token are contiguous: strides could change what torch vectorizes,
    and with it the last bits."""
    heads = x.shape[1]
    step = dt if dt_bias is None else dt + dt_bias
    step = (torch.logaddexp(step, torch.zeros_like(step)) if dt_softplus else step).clamp(low, high)
    B, C = (t.repeat_interleave(heads // t.shape[1], 1) for t in (B, C))
    after = torch.exp(A * step)[..., None, None] * state + (step[..., None] * x)[..., None] * B[:, :, None]
    y = torch.matmul(after, C[..., None]).squeeze(-1)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None])
    return after, y if z is None else y * F.silu(z)


def stochastic(v: Tensor, dtype: torch.dtype, noise: Tensor, advance: int) -> Tensor:
    """v, fp32, to bf16 or fp16: element e takes halfword e % 8 of draw e // 8 (op.py has the rule). NaN and Inf stay."""
    pairs = block_bytes(torch.arange((v.numel() + 7) // 8, device=v.device), noise, advance).long().view(-1, 2)
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

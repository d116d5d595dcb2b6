"""One step of the recurrence, in fp32, with the state written back in its own dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def refuses(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit) -> str | None:
    return None


@torch.no_grad()
def run(state: Tensor, x, dt, A, B, C, D, z, dt_bias, dt_softplus: bool, dt_limit: tuple[float, float]) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads = x.shape[1]
    step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias
    step = (torch.logaddexp(step, torch.zeros_like(step)) if dt_softplus else step).clamp(*dt_limit)
    B, C = (t.to(wide).repeat_interleave(heads // t.shape[1], 1) for t in (B, C))
    u = (step[..., None] * x.to(wide))[..., None] * B[:, :, None, :]
    after = torch.exp(A.to(wide) * step)[..., None, None] * state.to(wide) + u
    state.copy_(after)
    y = torch.matmul(after, C[..., None]).squeeze(-1)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None])
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)

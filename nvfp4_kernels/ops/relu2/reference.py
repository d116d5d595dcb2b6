"""y = max(x, 0)^2 * w and its derivatives 2 max(x, 0) w dy and <max(x, 0)^2, dy>."""

import torch
from torch import Tensor


def refuses(x: Tensor, weights: Tensor | None) -> str | None:
    return None


def run(x: Tensor, weights: Tensor | None) -> Tensor:
    r = _relu(x)
    return (r * r if weights is None else r * r * weights[:, None]).to(x.dtype).contiguous()


def backward(dy: Tensor, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and weights."""
    r = _relu(x)
    scaled = r * dy
    if weights is None:
        return (2 * scaled).to(x.dtype), None
    dweights = torch.linalg.vecdot(r.to(weights.dtype), scaled.to(weights.dtype))
    return (scaled * (2 * weights)[:, None]).to(x.dtype), dweights


def _relu(x: Tensor) -> Tensor:
    return torch.relu(x if x.dtype == torch.float64 else x.float())

"""torch's products of fp32 copies."""

import torch
from torch import Tensor


def refuses(x: Tensor, weight: Tensor) -> str | None:
    return None


def run(x: Tensor, weight: Tensor) -> Tensor:
    x = _wide(x)
    return x @ weight.to(x.dtype).t()


def backward(dlogits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight."""
    dx = (dlogits @ weight.to(dlogits.dtype)).to(x.dtype)
    return dx, (dlogits.t() @ _wide(x)).to(weight.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

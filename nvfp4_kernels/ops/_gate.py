"""y * silu(z), the gate that a scan without a norm behind it ends in; keeps y and z alone for backward."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gate(y: Tensor, z: Tensor) -> Tensor:
    """y silu(z) in fp32 (fp64 for fp64 y), rounded once to y's dtype; differentiable in both. Shapes are equal."""
    return _Gate.apply(y, z)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(y, z)
        return (y * F.silu(_wide(z))).to(y.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor):
        y, z = ctx.saved_tensors
        wide = _wide(z)
        sigmoid = torch.sigmoid(wide)
        dz = dout * y * sigmoid * (1 + wide * (1 - sigmoid))
        return (dout * (wide * sigmoid)).to(y.dtype), dz.to(z.dtype)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()

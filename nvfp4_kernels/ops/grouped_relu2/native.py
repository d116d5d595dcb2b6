"""The C++ kernels of the parts, one after another."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.grouped_matmul import native as grouped_matmul
from nvfp4_kernels.ops.grouped_relu2.reference import largest
from nvfp4_kernels.ops.relu2 import native as relu2


def refuses(a: Stack, b: Stack, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None) -> str | None:
    return grouped_matmul.refuses(a, b, offsets, out_dtype, rows)


def run(
    a: Stack, b: Stack, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None, weights: Tensor | None, amax: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    h = grouped_matmul.run(a, b, offsets, out_dtype, rows)
    squared = relu2.run(h, weights)
    return h, squared, largest(squared, offsets) if amax else None


def backward(
    a: Stack, b: Stack, offsets: Tensor, h: Tensor, weights: Tensor | None, again: bool, amax: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of h and weights, and what else is asked for."""
    d = grouped_matmul.run(a, b, offsets, torch.float32)
    dh, dweights = relu2.backward(d, h.float(), weights)
    dh = dh.to(h.dtype)
    return dh, dweights, relu2.run(h, weights) if again else None, largest(dh, offsets) if amax else None

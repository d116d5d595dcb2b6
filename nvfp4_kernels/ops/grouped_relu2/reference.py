"""The parts one after another: product, squared ReLU, largest magnitudes."""

from itertools import pairwise

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.grouped_matmul import reference as grouped_matmul
from nvfp4_kernels.ops.hadamard import reference as hadamard
from nvfp4_kernels.ops.relu2 import reference as relu2


def refuses(a: Stack, b: Stack, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None) -> str | None:
    return None


def run(
    a: Stack,
    b: Stack,
    offsets: Tensor,
    out_dtype: torch.dtype,
    rows: Tensor | None,
    weights: Tensor | None,
    amax: bool,
    signs: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    h = grouped_matmul.run(a, b, offsets, out_dtype, rows)
    squares = relu2.run(h, weights)
    return h, squares, largest(squares, offsets, signs) if amax else None


def backward(
    a: Stack,
    b: Stack,
    offsets: Tensor,
    h: Tensor,
    weights: Tensor | None,
    again: bool,
    amax: bool,
    signs: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of h and weights, and what else is asked for."""
    wide = torch.promote_types(h.dtype, torch.float32)
    d = grouped_matmul.run(a, b, offsets, wide)
    dh, dweights = relu2.backward(d, h, None if weights is None else weights.to(wide))
    return dh, dweights, relu2.run(h, weights) if again else None, largest(dh, offsets, signs) if amax else None


def largest(x: Tensor, offsets: Tensor, signs: int | None) -> Tensor:
    """fp32 [3, groups]: the largest magnitudes of the values in each group of rows, zeros, and those of the transform of its
    columns; 0 of a group without rows."""
    values = torch.segment_reduce(x.abs().amax(1).float(), "max", offsets=offsets, initial=0.0)
    found = torch.stack((values, torch.zeros_like(values), torch.zeros_like(values)))
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if signs is not None and begin < end:
            found[2, e] = hadamard.run(x[begin:end].t(), signs).abs().amax()
    return found

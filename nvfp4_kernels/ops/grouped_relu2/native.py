"""csrc/grouped_matmul, which makes the rest of its sums in registers."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack, rows_of
from nvfp4_kernels.ops._native import empty
from nvfp4_kernels.ops.grouped_matmul import native as grouped_matmul


def refuses(a: Stack, b: Stack, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None) -> str | None:
    return grouped_matmul.refuses(a, b, offsets, out_dtype, rows)


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
    squared = empty(len(a.values) if rows is None else len(rows), rows_of(b), dtype=out_dtype)
    weights, most = _wide(weights), _zeros(offsets) if amax else None
    h = grouped_matmul.run(a, b, offsets, out_dtype, rows, (None, squared, weights, None, most, signs))
    return h, squared, most


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
    h, weights = h.contiguous(), _wide(weights)
    dweights, squared = None if weights is None else torch.empty_like(weights), torch.empty_like(h) if again else None
    most = _zeros(offsets) if amax else None
    dh = grouped_matmul.run(a, b, offsets, h.dtype, None, (h, squared, weights, dweights, most, signs))
    return dh, dweights, squared, most


def _zeros(offsets: Tensor) -> Tensor:
    return offsets.new_zeros(3, len(offsets) - 1, dtype=torch.float32)


def _wide(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.float().contiguous()

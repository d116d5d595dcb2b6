"""Gather, sum and the derivatives of the weighted sum through csrc/permute."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_float


def refuses(x: Tensor) -> str | None:
    return refuses_float(x)


def run(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = empty(inverse.numel(), x.shape[1], dtype=x.dtype)
    sizes, routing, _kept = _places(rows, order, inverse, None)
    _check(native.permute(sizes, routing, x.data_ptr(), x.stride(0), rows.data_ptr(), torch.get_num_threads()))
    return rows


def combine(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    y, out = y.contiguous(), empty(inverse.shape[0], y.shape[1], dtype=y.dtype)
    sizes, routing, _kept = _places(y, order, inverse, weights)
    _check(native.unpermute(sizes, routing, y.data_ptr(), out.data_ptr(), torch.get_num_threads()))
    return out


def combine_backward(dout: Tensor, y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y and weights."""
    dout, y = dout.contiguous(), y.contiguous()
    dy, dweights = empty(y.shape, dtype=y.dtype), empty(weights.shape, dtype=torch.float32)
    sizes, routing, _kept = _places(y, order, inverse, weights)
    places = [t.data_ptr() for t in (y, dout, dy, dweights)]
    _check(native.unpermute_backward(sizes, routing, *places, torch.get_num_threads()))
    return dy, dweights.to(weights.dtype)


def _places(rows: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None) -> tuple[tuple, tuple, tuple]:
    """Sizes and addresses as csrc/bindings.cpp takes them, and the tensors behind the addresses."""
    kept = order, inverse, None if weights is None else weights.float().contiguous()
    return (
        (DTYPES[rows.dtype], *inverse.shape, rows.shape[1]),
        tuple(0 if t is None else t.data_ptr() for t in kept),
        kept,
    )


def _check(status: int) -> None:
    require(status != 2, "routing", "rows out of range", "a Routing as nk.route makes it")
    check(status)

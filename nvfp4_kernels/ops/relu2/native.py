"""Forward and backward through csrc/relu2, on rows copied only where they do not lie in order."""

import math

import torch
from torch import Tensor

from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_float


def refuses(x: Tensor, weights: Tensor | None) -> str | None:
    return refuses_float(x)


def run(x: Tensor, weights: Tensor | None) -> Tensor:
    x, weights = x.contiguous(), None if weights is None else weights.float().contiguous()
    y = empty(x.shape, dtype=x.dtype)
    check(native.relu2(_sizes(x), x.data_ptr(), _address(weights), y.data_ptr(), torch.get_num_threads()))
    return y


def backward(dy: Tensor, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and weights."""
    x, dy = x.contiguous(), dy.contiguous()
    wide = None if weights is None else weights.float().contiguous()
    dx = empty(x.shape, dtype=x.dtype)
    dweights = None if weights is None else empty(weights.shape, dtype=torch.float32)
    places = [t.data_ptr() for t in (dy, dx)]
    check(
        native.relu2_backward(
            _sizes(x), x.data_ptr(), _address(wide), *places, _address(dweights), torch.get_num_threads()
        )
    )
    return dx, None if weights is None else dweights.to(weights.dtype)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Type, rows and features; with fewer than two dimensions the values are one row."""
    return DTYPES[x.dtype], math.prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()

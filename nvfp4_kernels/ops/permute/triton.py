"""Gather, sum by token, and the derivatives of the weighted sum: each row is read and written once, nothing is scattered.

A program takes one row, or one token, and a stretch of features; a token's rows are summed in the order of its choices.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops._triton import jit, launch, next_power_of_2, refuses_device, tl


def refuses(x: Tensor) -> str | None:
    return "float64" if x.dtype == torch.float64 else refuses_device(x)


def block(features: int) -> int:
    """Of a row at once: 8 values a lane of 4 warps."""
    return min(next_power_of_2(features), 1024)


@jit
def gather_kernel(x_ptr, order_ptr, rows_ptr, x_stride, top_k, features, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(order_ptr + row) // top_k
    x = tl.load(x_ptr + token * x_stride + col, col < features, 0.0)
    tl.store(rows_ptr + row * features + col, x, col < features)


@jit
def sum_kernel(
    rows_ptr, inverse_ptr, weights_ptr, out_ptr, top_k, features, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(top_k):
        at = rows_ptr + tl.load(inverse_ptr + token * top_k + choice) * features + col
        row = tl.load(at, col < features, 0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weights_ptr + token * top_k + choice).to(tl.float32)
        total += row
    tl.store(out_ptr + token * features + col, total.to(out_ptr.dtype.element_ty), col < features)


@jit
def backward_kernel(
    dout_ptr, rows_ptr, order_ptr, weights_ptr, drows_ptr, dweights_ptr, top_k, features, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(order_ptr + row)
    token, weight = slot // top_k, tl.load(weights_ptr + slot).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, features, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < features
        dout = tl.load(dout_ptr + token * features + col, inside, 0.0).to(tl.float32)
        dweight += dout * tl.load(rows_ptr + row * features + col, inside, 0.0).to(tl.float32)
        tl.store(drows_ptr + row * features + col, (dout * weight).to(drows_ptr.dtype.element_ty), inside)
    tl.store(dweights_ptr + slot, tl.sum(dweight, 0))


def run(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    x, top_k, features = x if x.stride(1) == 1 else x.contiguous(), inverse.shape[1], x.shape[1]
    rows = torch.empty(inverse.numel(), features, dtype=x.dtype, device=x.device)
    width = block(features)
    grid = len(rows), -(-features // width)
    launch(gather_kernel, grid, x, order, rows, x.stride(0), top_k, features, BLOCK=width)
    return rows


def combine(
    y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    y, (tokens, top_k), features = y.contiguous(), inverse.shape, y.shape[1]
    out = torch.empty(tokens, features, dtype=dtype or y.dtype, device=y.device)
    width, given = block(features), y if weights is None else weights.contiguous()
    grid = tokens, -(-features // width)
    arguments = y, inverse, given, out, top_k, features
    launch(sum_kernel, grid, *arguments, WEIGHTED=weights is not None, BLOCK=width)
    return out


def combine_backward(dout: Tensor, y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y and weights."""
    y, dy = y.contiguous(), torch.empty_like(y, memory_format=torch.contiguous_format)
    dweights = torch.empty(weights.shape, dtype=torch.float32, device=y.device)
    sizes = inverse.shape[1], y.shape[1]
    tensors = dout.contiguous(), y, order, weights.contiguous(), dy, dweights
    launch(backward_kernel, (len(y),), *tensors, *sizes, BLOCK=block(y.shape[1]))
    return dy, dweights.to(weights.dtype)

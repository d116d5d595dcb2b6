"""relu2 forward and backward in one pass over memory each: x read and y written once; backward x and dy read, dx written once.

A program takes a few rows; for the weights' gradients it walks along them and sums up what it passes. Fewer than a warp's worth
of values a row share a program with other rows.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops._triton import as_rows, jit, launch, next_power_of_2, refuses_device, tl

MOST = 65535 * 1024  # values a row: the second axis of a launch grid has so many blocks


def refuses(x: Tensor, weights: Tensor | None) -> str | None:
    if x.dim() == 0 or x.shape[-1] > MOST:
        return f"a last axis of more than {MOST} values" if x.dim() else "a tensor without axes"
    return "float64" if x.dtype == torch.float64 else refuses_device(x)


def tile(features: int) -> dict:
    """1,024 values at once, 8 a lane of 4 warps: 16-bit loads are 16 bytes wide."""
    block = min(next_power_of_2(features), 1024)
    return dict(ROWS=1024 // block, BLOCK=block, num_warps=4)


@jit(do_not_specialize=["rows"])  # one compiled kernel for all loads
def forward_kernel(
    x_ptr, weights_ptr, y_ptr, x_stride, rows, features,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line, inside = row[:, None].to(tl.int64), (row < rows)[:, None] & (col < features)[None, :]
    x = tl.load(x_ptr + line * x_stride + col[None, :], inside, 0.0).to(tl.float32)
    y = tl.where(x < 0, 0.0, x)  # NaN stays
    y = y * y
    if WEIGHTED:
        y = y * tl.load(weights_ptr + row, row < rows, 0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + line * features + col[None, :], y.to(y_ptr.dtype.element_ty), inside)


@jit(do_not_specialize=["rows"])
def backward_kernel(
    dy_ptr, x_ptr, weights_ptr, dx_ptr, dweights_ptr, dy_stride, x_stride, rows, features,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line, present = row[:, None].to(tl.int64), row < rows
    twice = tl.full([ROWS], 2.0, tl.float32)
    if WEIGHTED:
        twice = 2.0 * tl.load(weights_ptr + row, present, 0.0).to(tl.float32)
    dweights = tl.zeros([ROWS], tl.float32)
    for start in range(0, features, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = present[:, None] & (col < features)[None, :]
        x = tl.load(x_ptr + line * x_stride + col[None, :], inside, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + line * dy_stride + col[None, :], inside, 0.0).to(tl.float32)
        r = tl.where(x < 0, 0.0, x)
        d = dy * r
        dweights += tl.sum(d * r, 1)
        tl.store(dx_ptr + line * features + col[None, :], (d * twice[:, None]).to(dx_ptr.dtype.element_ty), inside)
    if WEIGHTED:
        tl.store(dweights_ptr + row, dweights, present)


def run(x: Tensor, weights: Tensor | None) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = as_rows(x)
    form = tile(rows.shape[1])
    grid = -(-rows.shape[0] // form["ROWS"]), -(-rows.shape[1] // form["BLOCK"])
    given = rows if weights is None else weights.contiguous()
    arguments = rows, given, y, rows.stride(0), *rows.shape
    launch(forward_kernel, grid, *arguments, WEIGHTED=weights is not None, **form)
    return y


def backward(dy: Tensor, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and weights."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, dy = as_rows(x), as_rows(dy)
    form = tile(x.shape[1])
    given, dweights = x, None
    if weights is not None:
        given, dweights = weights.contiguous(), torch.empty(weights.shape, dtype=torch.float32, device=x.device)
    arguments = dy, x, given, dx, dx if dweights is None else dweights, dy.stride(0), x.stride(0), *x.shape
    grid = (-(-x.shape[0] // form["ROWS"]),)
    launch(backward_kernel, grid, *arguments, WEIGHTED=weights is not None, **form)
    return dx, None if dweights is None else dweights.to(weights.dtype)

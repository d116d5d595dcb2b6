"""One call of csrc/expert_mlp, with room for the rows sorted by expert: their tokens, the hidden values, the outputs; on GPUs
packed experts."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack, is_packed
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_float
from nvfp4_kernels.ops.expert_mlp import _cuda
from nvfp4_kernels.ops.grouped_matmul.native import operand, readable


def refuses(
    x: Tensor, weights: Tensor, offsets: Tensor, inverse: Tensor, order: Tensor, up: Stack, down: Stack
) -> str | None:
    if is_packed(up) or is_packed(down):
        return _cuda.refuses(x, weights, offsets, inverse, order, up, down)
    return refuses_float(x) or ("float64" if torch.float64 in (up.values.dtype, down.values.dtype) else None)


def run(x: Tensor, weights: Tensor, offsets: Tensor, inverse: Tensor, order: Tensor, up: Stack, down: Stack) -> Tensor:
    if is_packed(up):
        return _cuda.run(x, weights, offsets, inverse, order, up, down)
    weights, up, down = weights.float().contiguous(), readable(up), readable(down)
    rows, width = inverse.numel(), up.values.shape[1]
    token, hidden = empty(rows, dtype=torch.int64), empty(rows, width, dtype=x.dtype)
    made, y = empty(rows, x.shape[1], dtype=torch.float32), empty(x.shape, dtype=x.dtype)
    status = native.expert_mlp(
        (DTYPES[x.dtype], x.data_ptr(), 0, 0, *x.shape, *x.stride()),
        *operand(up),
        *operand(down),
        (len(offsets) - 1, inverse.shape[1], *(t.data_ptr() for t in (offsets, inverse, order, weights))),
        (token.data_ptr(), hidden.data_ptr(), made.data_ptr()),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    require(status != 2, "routing", "rows out of range", "a Routing as nk.route makes it")
    check(status)
    return y

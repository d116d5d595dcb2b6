"""quantize through csrc/quantize: any strides, both forms in one pass; AVX-512, AVX2 or scalar code on CPUs, CUDA on GPUs."""

from functools import lru_cache

import torch
from torch import Tensor

from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops._native import DTYPES, check, native, refuses_device
from nvfp4_kernels.ops.quantize import _cuda as cuda

BLOCKS = {"1x16": 1, "16x16": 2, "1x32": 3}
CHOICES = {None: 0, "mae": 1, "mse": 2}
NONE = (0, False, 0, -1, 0, 0, 0)


def refuses(
    x: Tensor,
    row: QuantSpec | None,
    col: QuantSpec | None,
    noise: Tensor | None,
    offsets: Tensor | None = None,
    starts: Tensor | None = None,
) -> str | None:
    if offsets is not None or x.dim() == 3:
        return "groups and stacks"
    return cuda.refuses(x, row, col) if _cuda.takes(x) else refuses_device(x)


def run(
    x: Tensor,
    row: QuantSpec | None,
    col: QuantSpec | None,
    noise: Tensor | None,
    offsets: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Codes, scales and global scale of x [rows, cols] by `row`, then those of x.T by `col`; empty for None."""
    rows, cols = x.shape
    row_parts, row_form = _form(row, rows, cols, x.device)
    col_parts, col_form = _form(col, cols, rows, x.device)
    noise = None if noise is None else noise.contiguous()
    if _cuda.takes(x):
        cuda.run(x, (row, row_parts, 0), (col, col_parts, int(row is not None and row.stochastic)), noise)
        return (*row_parts, *col_parts)
    status = native.quantize(
        x.data_ptr(),
        DTYPES[x.dtype],
        rows,
        cols,
        *x.stride(),
        row_form,
        col_form,
        0 if noise is None else noise.data_ptr(),
        torch.get_num_threads(),
    )
    check(status)
    return (*row_parts, *col_parts)


@lru_cache
def _numbers(spec: QuantSpec) -> tuple[int, bool, int, int]:
    signs = -1 if spec.hadamard is None else spec.hadamard
    return BLOCKS[spec.block], spec.stochastic, CHOICES[spec.four_over_six], signs


def _form(
    spec: QuantSpec | None, rows: int, cols: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple]:
    """The output tensors of one form, and what csrc/bindings.cpp calls a form."""

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    if spec is None:
        nothing = empty(torch.uint8, 0), empty(torch.uint8, 0), empty(torch.float32, 0)
        return nothing, NONE
    if spec.block == "1x32":
        blocks = (cols + 31) // 32
        codes = empty(torch.float8_e4m3fn, rows, blocks * 32)
        scales = empty(torch.uint8, rows, blocks)
        global_scale = empty(torch.float32, 0)
    else:
        blocks = (cols + 15) // 16
        codes = empty(torch.uint8, rows, blocks * 8)
        scales = empty(torch.float8_e4m3fn, rows, blocks)
        global_scale = empty(torch.float32)
    pointers = codes.data_ptr(), scales.data_ptr(), global_scale.data_ptr()
    return (codes, scales, global_scale), (*_numbers(spec), *pointers)

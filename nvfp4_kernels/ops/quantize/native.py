"""quantize through csrc/quantize: any strides, both forms in one pass; AVX-512, AVX2 or scalar code on CPUs, CUDA on GPUs."""

from functools import lru_cache

import torch
from torch import Tensor

from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops._native import DTYPES, check, native, refuses_device
from nvfp4_kernels.ops.quantize import _cuda as cuda
from nvfp4_kernels.ops.quantize._forms import Groups, Spec, check_ascending, empty_forms

BLOCKS = {"1x16": 1, "16x16": 2, "1x32": 3}
CHOICES = {None: 0, "mae": 1, "mse": 2}
NONE = (0, False, 0, -1, 0, 0, 0)
NO_GROUPS = (0, 0, 0, 0, 0)


def refuses(
    x: Tensor, row: Spec, col: Spec, noise: Tensor | None, groups: Groups | None = None, amax: Tensor | None = None
) -> str | None:
    return cuda.refuses(x, row, col) if _cuda.takes(x) else refuses_device(x)


def run(
    x: Tensor, row: Spec, col: Spec, noise: Tensor | None, groups: Groups | None = None, amax: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Codes, scales and global scale of x [rows, cols] by `row`, then those of x.T by `col`; empty for None.

    x may be a stack [groups, rows, cols]; with `groups` each group of rows is a matrix to the column form.
    amax: fp32 [1, 1] or [1, groups], to be taken for the largest magnitude of x; [3, ...]: also of the row form's transform
        and of the column form's; None: they are found here.
    """
    row_parts, col_parts = empty_forms(x, row, col, groups)
    noise, amax = (None if t is None else t.contiguous() for t in (noise, amax))
    index = None if groups is None else groups.rows
    if _cuda.takes(x):
        advance = int(row is not None and row.stochastic)
        cuda.run(x, (row, row_parts, 0), (col, col_parts, advance), noise, groups, amax)
        return (*row_parts, *col_parts)
    if index is not None and x.stride(1) != 1:  # the C++ kernels gather rows in order in memory
        x, index = x.index_select(0, index), None
    rows, cols = x.shape[-2:] if index is None else (len(index), x.shape[1])
    status = native.quantize(
        x.data_ptr(),
        DTYPES[x.dtype],
        rows,
        cols,
        *x.stride()[-2:],
        (len(x), x.stride(0)) if x.dim() == 3 else (1, 0),
        NO_GROUPS if groups is None else _groups(groups, index, col_parts[1].shape[1]),
        _form(row, row_parts),
        _form(col, col_parts),
        *(0 if t is None else t.data_ptr() for t in (noise, amax)),
        amax is not None and len(amax) == 3,
        torch.get_num_threads(),
    )
    if status == 2:
        check_ascending(groups.offsets, rows)
    check(status)
    return (*row_parts, *col_parts)


def _groups(groups: Groups, index: Tensor | None, line: int) -> tuple[int, ...]:
    """What csrc/bindings.cpp calls groups; line: blocks of a line."""
    places = groups.offsets.data_ptr(), groups.starts.data_ptr()
    return *places, len(groups.offsets) - 1, line, 0 if index is None else index.data_ptr()


@lru_cache
def _numbers(spec: QuantSpec) -> tuple[int, bool, int, int]:
    signs = -1 if spec.hadamard is None else spec.hadamard
    return BLOCKS[spec.block], spec.stochastic, CHOICES[spec.four_over_six], signs


def _form(spec: QuantSpec | None, parts: tuple[Tensor, Tensor, Tensor]) -> tuple:
    """What csrc/bindings.cpp calls a form."""
    return NONE if spec is None else (*_numbers(spec), *(part.data_ptr() for part in parts))

"""The largest magnitudes that the scales want: of the values, and of what the Hadamard transform makes of them, from one
read of x.

Each program passes every so manieth tile and leaves its largest magnitudes, as the bits of fp32: these order as the
magnitudes do, infinities and NaN above all numbers. quantize_kernel takes the largest of all programs itself, which spares
an atomic and the zero it would have to start from. Bytes a value, bf16 in: 2.
"""

import torch
from torch import Tensor

from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops._triton import jit, launch, next_power_of_2, tl
from nvfp4_kernels.ops._triton_groups import find
from nvfp4_kernels.ops._triton_numerics import as_fp32, bits, hadamard, load_picked_runs, load_runs
from nvfp4_kernels.ops.quantize._forms import put_amax, spares
from nvfp4_kernels.ops.quantize._triton_encode import magnitudes


@jit
def values_kernel(x_ptr, amax_ptr, lines, length, line_stride, step, LINES: tl.constexpr, LENGTH: tl.constexpr):
    """Largest magnitude of the values alone."""
    across = tl.cdiv(length, LENGTH)
    most = tl.zeros([LINES, LENGTH], tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(lines, LINES) * across, tl.num_programs(0)):
        line = (tile // across) * LINES + tl.arange(0, LINES)
        j = tl.cast(tile % across, tl.int64) * LENGTH + tl.arange(0, LENGTH)
        at = x_ptr + line[:, None].to(tl.int64) * line_stride + j[None, :] * step
        x = tl.load(at, (line < lines)[:, None] & (j < length)[None, :], 0)
        most = tl.maximum(most, bits(as_fp32(x)) & 0x7FFFFFFF)
    tl.store(amax_ptr + tl.program_id(0), tl.max(tl.reshape(most, [LINES * LENGTH]), 0))


@jit
def groups_kernel(
    x_ptr, amax_ptr, offsets_ptr, index_ptr, tokens, groups, rows, cols, row_stride, col_stride,
    ROW: tl.constexpr, COL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """For each group of rows what turned_kernel leaves of the whole: the largest of amax_ptr [3, groups] and the group's."""
    across = tl.cdiv(cols, COLS)
    group, begin, end, row = find(offsets_ptr, groups, rows, tl.program_id(0) // across, ROWS, GROUPS)
    if group < groups:
        col, at = tl.program_id(0) % across * COLS, amax_ptr + group
        line, block = col + tl.arange(0, COLS), (row - begin).to(tl.int32) // 16 + tl.arange(0, ROWS // 16)
        if PICKED:
            index_ptr += begin
            v = load_picked_runs(x_ptr, index_ptr, tokens, line, block, cols, end - begin, col_stride, row_stride)
        else:
            x_ptr += begin * row_stride
            v = load_runs(x_ptr, line, block, cols, end - begin, col_stride, row_stride, False)
        most = raw_magnitudes(v, tl.zeros([COLS, ROWS // 16], tl.int32))
        tl.atomic_max(at, tl.max(tl.max(most, 1), 0), sem="relaxed")
        if COL is not None:
            tl.atomic_max(at + 2 * groups, bits(tl.max(tl.max(magnitudes(hadamard(v, COL)), 1), 0)), sem="relaxed")
        if ROW is not None:
            line = (row - begin).to(tl.int32) + tl.arange(0, ROWS)
            block = col // 16 + tl.arange(0, COLS // 16)
            v = load_runs(x_ptr, line, block, end - begin, cols, row_stride, col_stride, False)
            tl.atomic_max(at + groups, bits(tl.max(tl.max(magnitudes(hadamard(v, ROW)), 1), 0)), sem="relaxed")


@jit
def raw_magnitudes(v, most):
    for j in tl.static_range(16):
        most = tl.maximum(most, bits(v[j]) & 0x7FFFFFFF)
    return most


@jit
def turned_kernel(
    x_ptr, amax_ptr, rows, cols, row_stride, col_stride,
    ROW: tl.constexpr, COL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Largest magnitudes of the values, of the transform of rows (signs ROW, or None) and of that of columns (COL)."""
    across = tl.cdiv(cols, COLS)
    row_most = tl.zeros([ROWS, COLS // 16], tl.int32)
    row_turned = tl.zeros([ROWS, COLS // 16], tl.float32)
    col_most = tl.zeros([COLS, ROWS // 16], tl.int32)
    col_turned = tl.zeros([COLS, ROWS // 16], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0)):
        row, col = (tile // across) * ROWS, (tile % across) * COLS
        if ROW is not None:
            line, block = row + tl.arange(0, ROWS), col // 16 + tl.arange(0, COLS // 16)
            v = load_runs(x_ptr, line, block, rows, cols, row_stride, col_stride, WIDE)
            row_most = raw_magnitudes(v, row_most)
            row_turned = tl.maximum(row_turned, magnitudes(hadamard(v, ROW)))
        if COL is not None:
            line, block = col + tl.arange(0, COLS), row // 16 + tl.arange(0, ROWS // 16)
            v = load_runs(x_ptr, line, block, cols, rows, col_stride, row_stride, False)
            if ROW is None:
                col_most = raw_magnitudes(v, col_most)
            col_turned = tl.maximum(col_turned, magnitudes(hadamard(v, COL)))
    at = amax_ptr + tl.program_id(0)
    raw = tl.maximum(tl.max(tl.max(row_most, 1), 0), tl.max(tl.max(col_most, 1), 0))
    tl.store(at, raw)
    if ROW is not None:
        tl.store(at + tl.num_programs(0), bits(tl.max(tl.max(row_turned, 1), 0)))
    if COL is not None:
        tl.store(at + 2 * tl.num_programs(0), bits(tl.max(tl.max(col_turned, 1), 0)))


def amaxes(x: Tensor, row: QuantSpec | None, col: QuantSpec | None, wide: bool, amax: Tensor | None) -> Tensor:
    """int32 [3, programs]: what each program found of the values, of the row form's transform and of the column form's.

    amax: as quantize's run takes it.
    """
    if spares(amax, row, col):
        return _given(x, amax)
    programs = 4 * _device.multiprocessors(x.device)  # of 8 warps, so that loads in flight cover the memory's latency
    row_signs, col_signs = (None if spec is None else spec.hadamard for spec in (row, col))
    rows, cols = x.shape
    if row_signs is None and col_signs is None:
        # as one line, unless the kernel, which rounds its length up to whole tiles in 31 bits, would find it negative
        one = x.is_contiguous() and not 2**31 - 8192 < rows * cols < 2**31
        lines, length = (1, rows * cols) if one else (rows, cols)
        tile_length = min(8192, next_power_of_2(length))
        tile_lines = min(8192 // tile_length, next_power_of_2(lines))
        programs = _programs(lines, length, tile_lines, tile_length, programs)
        found = torch.empty(3, programs, dtype=torch.int32, device=x.device)
        launch(
            values_kernel,
            (programs,),
            *(x, found, lines, length, *x.stride()),
            **dict(LINES=tile_lines, LENGTH=tile_length),
            num_warps=8,
        )
        return found
    programs = _programs(rows, cols, 64, 128, programs)
    found = torch.empty(3, programs, dtype=torch.int32, device=x.device)
    launch(
        turned_kernel,
        (programs,),
        *(x, found, rows, cols, *x.stride()),
        **dict(ROW=row_signs, COL=col_signs, WIDE=wide, ROWS=64, COLS=128),
        num_warps=8,
        fusion=False,
    )
    if amax is not None:
        put_amax(amax, found)
    return found


def _given(x: Tensor, amax: Tensor) -> Tensor:
    found = torch.empty(3, amax.shape[1], dtype=torch.int32, device=x.device)
    put_amax(amax, found)
    return found


def _programs(rows: int, cols: int, tile_rows: int, tile_cols: int, most: int) -> int:
    return max(1, min(most, -(-rows // tile_rows) * -(-cols // tile_cols)))


def group_amaxes(
    x: Tensor, row: QuantSpec | None, col: QuantSpec, offsets: Tensor, index: Tensor | None, amax: Tensor | None
) -> Tensor:
    """int32 [3, groups]: as amaxes, of each group of rows. Of integers, the largest is the same in any order of atomics."""
    (tokens, cols), groups = x.shape, len(offsets) - 1
    rows = tokens if index is None else len(index)
    if spares(amax, row, col):
        return _given(x, amax)
    found = torch.zeros(3, groups, dtype=torch.int32, device=x.device)
    launch(
        groups_kernel,
        (-(-cols // 128) * (-(-rows // 64) + groups),),
        *(x, found, offsets, offsets if index is None else index, tokens, groups, rows, cols, *x.stride()),
        **dict(ROW=None if row is None else row.hadamard, COL=col.hadamard),
        **dict(ROWS=64, COLS=128, GROUPS=next_power_of_2(max(groups, 1)), PICKED=index is not None),
        num_warps=8,
        fusion=False,
    )
    if amax is not None:
        put_amax(amax, found)
    return found

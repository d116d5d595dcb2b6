"""quantize in Triton: one read of x for the amax (_triton_amax.py) unless it is given, one for both forms' codes and scales.

A thread holds whole blocks: 16 consecutive values of a row for the row form, of a column for the column form, whose second
load of the tile finds it in the L1 cache. No thread so ever waits for another, but for the one amax of a 16x16 tile; the
packed words of the column form alone, half a byte a value, change threads on their way out. Nothing is read by the host.
Bytes a value, bf16 in: 2 read for the amax, 2 for the codes, 0.5625 written a form (MXFP8 1.03).
SASS instructions a value in the loop over tiles: 14 for a row form on sm_90, 7 on sm_100, which converts to E2M1 itself; 38
and 24 for a pair with a transform; 49 for the pair with stochastic rounding. H200 issues 18 at most in the time that a row
form's bytes take at the speed of a copy, 21 in a pair's: the pairs wait for instructions, not for memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.ops import _device, _tuned
from nvfp4_kernels.ops._triton import jit, launch, next_power_of_2, refuses_device, tl
from nvfp4_kernels.ops._triton_groups import find
from nvfp4_kernels.ops._triton_numerics import (
    bf16_pair,
    hadamard,
    load_picked_runs,
    load_runs,
    readable,
    values_of,
    wide,
)
from nvfp4_kernels.ops.quantize._forms import Groups, Spec, empty_forms, exchanged
from nvfp4_kernels.ops.quantize._triton_amax import amaxes, group_amaxes
from nvfp4_kernels.ops.quantize._triton_encode import encode_mxfp8, encode_nvfp4, scale_of, tensor_scale


def refuses(
    x: Tensor, row: Spec, col: Spec, noise: Tensor | None, groups: Groups | None = None, amax: Tensor | None = None
) -> str | None:
    return refuses_device(x)


@dataclass(frozen=True)
class Tile:
    rows: int
    cols: int
    warps: int


CHANGES = ({}, {"warps": 8}, {"warps": 2}, {"rows": 32}, {"cols": 128})  # of a tile; no value depends on another tile's


def tile(rows: int, cols: int, row: QuantSpec | None, col: QuantSpec | None) -> Tile:
    """What a program quantizes at once, and warps: 32 values a thread, which keep loads in flight in few registers (58 to 127).

    With a column form 64 x 64: 32 bytes of codes, a memory sector, in a row of either form. Without one rows of 256, or
    longer where there are few, for longer runs of memory.
    """
    if col is not None:
        return Tile(64, 64, 4)
    tall = 16 if row is not None and row.block == "16x16" else min(16, next_power_of_2(rows))
    broad = max(32, min(next_power_of_2(cols), 1024, 4096 // tall))
    return Tile(tall, broad, max(1, tall * broad // 1024))


@jit
def rotate(v, SIGNS: tl.constexpr):
    """The transform, rounded to bf16, as fp32."""
    turned, rounded = hadamard(v, SIGNS), ()
    for i in tl.static_range(0, 16, 2):
        rounded += values_of(bf16_pair(turned[i], turned[i + 1]), tl.int16)
    return rounded


@jit
def form(
    v, codes_ptr, scales_ptr, line, block, lines, length, before, line_runs, scale, seed, offset,
    SPEC: tl.constexpr, WIDE: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """Codes and scales of the blocks `block` (of 16) of the lines `line`: rows of x, or columns. v: their values.

    In the form they have `before` blocks before them, and lines are `line_runs` blocks long.
    """
    if SPEC.block == "1x32":
        runs = tl.cdiv(length, 32) * 2
        low, high, exponent = encode_mxfp8(v)
        pair = tl.min(tl.reshape(block, [block.shape[0] // 2, 2]), 1) // 2
        store(codes_ptr, tl.join(low, high), line, block, lines, runs, before, line_runs, WIDE)
        store(scales_ptr, exponent.to(tl.uint8), line, pair, lines, runs // 2, before // 2, line_runs // 2, WIDE)
    else:
        runs = tl.cdiv(length, 16)
        if SPEC.hadamard is not None:
            v = rotate(v, SPEC.hadamard)
        index = line[:, None].to(tl.int64) * line_runs + (block[None, :] + before)
        codes, scales = encode_nvfp4(v, index, scale[0], scale[1], scale[2], scale[3], seed, offset, SPEC, CONVERTS)
        store(codes_ptr, codes, line, block, lines, runs, before, line_runs, WIDE)
        store(scales_ptr, scales.to(tl.uint8), line, block, lines, runs, before, line_runs, WIDE)


@jit
def store(out_ptr, x, line, block, lines, runs, before, line_runs, WIDE: tl.constexpr):
    """x [lines, blocks], or with a last axis of 2, to rows of `line_runs` elements, `before` elements further on.

    WIDE: threads follow the blocks already; else x is turned first, so that its own addresses lend their layout to the store
    alone.
    """
    if not WIDE:
        x = tl.permute(x, (1, 0, 2)) if len(x.shape) == 3 else tl.trans(x)
        line, block = line[None, :], block[:, None]
    else:
        line, block = line[:, None], block[None, :]
    at = line.to(tl.int64) * line_runs + (block + before)
    inside = (line < lines) & (block < runs)
    if len(x.shape) == 3:
        at = at[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        inside = inside[:, :, None]
    tl.store(out_ptr + at, x, inside)


@jit
def quantize_kernel(
    x_ptr, amax_ptr, noise_ptr, row_codes_ptr, row_scales_ptr, row_global_ptr, col_codes_ptr, col_scales_ptr,
    col_global_ptr, rows, cols, row_stride, col_stride, row_before, col_before, programs, offsets_ptr, starts_ptr, col_runs,
    index_ptr, tokens,
    ROW: tl.constexpr, COL: tl.constexpr, WIDE: tl.constexpr, COL_ADVANCE: tl.constexpr, ROW_ADVANCE: tl.constexpr,
    CONVERTS: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUPED: tl.constexpr,
    STACKED: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """GROUPED: `programs` is the number of groups, for each of which amax_ptr has the largest magnitudes. STACKED: the matrix
    has others before it, row_before and col_before blocks of them. PICKED: the groups' rows are those of the `tokens` rows of
    x that the index names."""
    first = tl.program_id(0) + tl.program_id(1) == 0
    row_scale, col_scale = (0.0, 0.0, 0.0, True), (0.0, 0.0, 0.0, True)
    if ROW is not None and ROW.block != "1x32":
        row_scale = tensor_scale(amax_ptr, programs, PROGRAMS, 1, ROW)
        if first:
            tl.store(row_global_ptr, tl.where(row_scale[3], row_scale[2], float("nan")))
    if COL is not None and COL.block != "1x32":
        if GROUPED:
            if first:
                each = tl.arange(0, PROGRAMS)
                raw = tl.load(amax_ptr + each, each < programs, 0)
                turned = tl.load(amax_ptr + 2 * programs + each, each < programs, 0)
                scales = scale_of(raw, turned, COL)
                tl.store(col_global_ptr + each, tl.where(scales[3], scales[2], float("nan")), each < programs)
        else:
            col_scale = tensor_scale(amax_ptr, programs, PROGRAMS, 2, COL)
            if first:
                tl.store(col_global_ptr, tl.where(col_scale[3], col_scale[2], float("nan")))
    seed, offset = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if (ROW is not None and ROW.stochastic) or (COL is not None and COL.stochastic):
        seed, offset = tl.load(noise_ptr), tl.load(noise_ptr + 1)
    col = tl.program_id(0) * COLS
    if GROUPED:
        across = tl.maximum(tl.cdiv(cols, COLS), 1)  # one axis of the grid: a second ends at 65,535
        place, col = tl.program_id(0) // across, tl.program_id(0) % across * COLS
        group, begin, end, row = find(offsets_ptr, programs, rows, place, ROWS, PROGRAMS)
        if group < programs:
            if COL.block != "1x32":
                raw, turned = tl.load(amax_ptr + group), tl.load(amax_ptr + 2 * programs + group)
                col_scale = scale_of(raw, turned, COL)
            if ROW is not None:
                line, block = row + tl.arange(0, ROWS), col // 16 + tl.arange(0, COLS // 16)
                v = load_runs(x_ptr, line, block, end, cols, row_stride, col_stride, WIDE)
                form(
                    v, row_codes_ptr, row_scales_ptr, line, block, end, cols, 0,
                    tl.cdiv(cols, ROW.run) * (ROW.run // 16), row_scale, seed, offset + ROW_ADVANCE, ROW, WIDE, CONVERTS,
                )  # fmt: skip
            line = col + tl.arange(0, COLS)
            block = (row - begin).to(tl.int32) // 16 + tl.arange(0, ROWS // 16)
            before = tl.load(starts_ptr + group) // 16
            if (before >= 0) & (before + tl.cdiv(end - begin, COL.run) * (COL.run // 16) <= col_runs):
                length = end - begin
                if PICKED:
                    v = load_picked_runs(
                        x_ptr, index_ptr + begin, tokens, line, block, cols, length, col_stride, row_stride
                    )
                else:
                    v = load_runs(x_ptr + begin * row_stride, line, block, cols, length, col_stride, row_stride, False)
                form(
                    v, col_codes_ptr, col_scales_ptr, line, block, cols, length, before, col_runs, col_scale, seed,
                    offset + COL_ADVANCE, COL, False, CONVERTS,
                )  # fmt: skip
    else:
        for down in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
            row = down * ROWS
            if ROW is not None:
                line, block = row + tl.arange(0, ROWS), col // 16 + tl.arange(0, COLS // 16)
                v = load_runs(x_ptr, line, block, rows, cols, row_stride, col_stride, WIDE)
                form(
                    v, row_codes_ptr, row_scales_ptr, line, block, rows, cols,
                    row_before if STACKED else 0,
                    tl.cdiv(cols, ROW.run) * (ROW.run // 16), row_scale, seed, offset + ROW_ADVANCE, ROW, WIDE, CONVERTS,
                )  # fmt: skip
            if COL is not None:
                line, block = col + tl.arange(0, COLS), row // 16 + tl.arange(0, ROWS // 16)
                v = load_runs(x_ptr, line, block, cols, rows, col_stride, row_stride, False)
                form(
                    v, col_codes_ptr, col_scales_ptr, line, block, cols, rows,
                    col_before if STACKED else 0,
                    tl.cdiv(rows, COL.run) * (COL.run // 16), col_scale, seed, offset + COL_ADVANCE, COL, False, CONVERTS,
                )  # fmt: skip


def run(
    x: Tensor, row: Spec, col: Spec, noise: Tensor | None, groups: Groups | None = None, amax: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Codes, scales and global scale of x [rows, cols] by `row`, then those of x.T by `col`; empty for None.

    x may be a stack [groups, rows, cols]; with `groups` each group of rows is a matrix to the column form.
    amax: fp32 [1, 1] or [1, groups], to be taken for the largest magnitude of x; [3, ...]: also of the row form's transform
        and of the column form's; None: they are found here.
    """
    row_parts, col_parts = empty_forms(x, row, col, groups)
    advance = int(row is not None and row.stochastic)
    if groups is not None:
        for part in col_parts:
            part.view(torch.uint8).zero_()  # what no group has
        _launch_groups(x, (row, row_parts, 0), (col, col_parts, advance), noise, groups, amax)
    elif x.dim() == 2:
        _launch(x, (row, row_parts, 0, 0), (col, col_parts, advance, 0), noise, amax)
    else:
        for e in range(len(x)):
            forms = [(codes, scales, g[e] if g.numel() else g) for codes, scales, g in (row_parts, col_parts)]
            before = [e * (scales[0].numel() if scales.dim() == 3 else 0) for _, scales, _ in forms]
            _launch(x[e], (row, forms[0], 0, before[0]), (col, forms[1], advance, before[1]), noise, amax)
    return (*row_parts, *col_parts)


def _launch(x: Tensor, row: tuple, col: tuple, noise: Tensor | None, amax: Tensor | None) -> None:
    """row, col: (QuantSpec or None, its tensors, how far the noise's offset is ahead, scales of a stack's earlier matrices)."""
    if x.stride(0) == 1 and x.stride(1) != 1:  # column-major: the transpose is row-major, and its forms change places
        x, row, col, amax = x.t(), col, row, exchanged(amax)
    rows, cols = x.shape
    words, x = wide(x), readable(x)
    row_spec, col_spec = row[0], col[0]
    scaled = [spec for spec in (row_spec, col_spec) if spec is not None and spec.format == "nvfp4"]
    found = amaxes(x, row_spec, col_spec, words, amax) if scaled else x
    programs = found.shape[1] if scaled else 0
    t = _tuned.tile(tile(rows, cols, row_spec, col_spec), CHANGES, x.device, "quantize", row_spec, col_spec)
    across, down = max(1, -(-cols // t.cols)), max(1, -(-rows // t.rows))
    # a program walks down a few tiles, which share what it needs of the scales
    down = min(down, max(1, 16 * _device.multiprocessors(x.device) // across))
    befores = [0 if spec is None else before * (spec.run // 16) for spec, _, _, before in (row, col)]
    launch(
        quantize_kernel,
        (across, down),
        *(x, found, found if noise is None else noise.contiguous()),
        *_pointers(row_spec, row[1], found),
        *_pointers(col_spec, col[1], found),
        *(rows, cols, *x.stride(), *befores, programs, found, found, 0, found, 0),
        **_constants(x, row, col, words),
        **dict(PROGRAMS=next_power_of_2(programs), ROWS=t.rows, COLS=t.cols, GROUPED=False, STACKED=any(befores)),
        PICKED=False,
        num_warps=t.warps,
        fusion=False,
    )


def _launch_groups(
    x: Tensor, row: tuple, col: tuple, noise: Tensor | None, groups: Groups, amax: Tensor | None
) -> None:
    (tokens, cols), (offsets, starts, index), count = x.shape, groups, len(groups.offsets) - 1
    rows = tokens if index is None else len(index)
    words, x = wide(x), readable(x)
    scaled = [spec for spec in (row[0], col[0]) if spec is not None and spec.format == "nvfp4"]
    found = group_amaxes(x, row[0], col[0], offsets, index, amax) if scaled else x
    t = _tuned.tile(tile(rows, cols, row[0], col[0]), CHANGES, x.device, "quantize", row[0], col[0])
    launch(
        quantize_kernel,
        (max(1, -(-cols // t.cols)) * max(1, -(-rows // t.rows) + count),),
        *(x, found, found if noise is None else noise.contiguous()),
        *_pointers(row[0], row[1], found),
        *_pointers(col[0], col[1], found),
        *(rows, cols, *x.stride(), 0, 0, count, offsets, starts, col[1][1].shape[1] * (col[0].run // 16)),
        *(offsets if index is None else index, tokens),
        **_constants(x, row, col, words),
        **dict(PROGRAMS=next_power_of_2(max(count, 1)), ROWS=t.rows, COLS=t.cols, GROUPED=True, STACKED=False),
        PICKED=index is not None,
        num_warps=t.warps,
        fusion=False,
    )


def _constants(x: Tensor, row: tuple, col: tuple, words: bool) -> dict:
    advances = dict(ROW_ADVANCE=row[2], COL_ADVANCE=col[2])
    return dict(ROW=row[0], COL=col[0], WIDE=words, CONVERTS=_device.converts_to_fp4(x.device)) | advances


def _pointers(spec: QuantSpec | None, parts: tuple[Tensor, ...], nothing: Tensor) -> tuple[Tensor, ...]:
    """What the kernel writes to: codes eight bytes at a time, scales as bytes."""
    if spec is None:
        return nothing, nothing, nothing
    codes, scales, global_scale = parts
    return codes.flatten().view(torch.int64), scales.view(torch.uint8), global_scale

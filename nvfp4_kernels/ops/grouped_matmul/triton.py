"""Groups of products in Triton, one launch for all groups: on FP4 tensor cores where both operands are NVFP4 and the device has
them (ops/matmul/_triton_block_scaled.py), of decoded operands everywhere else (ops/matmul/_triton_decoded.py).

Each program finds its tile of rows from the offsets (ops/_triton_groups.py). Sums that are divided among groups run from one
offset to the next, a program a tile of one group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Columns, Stack, rows_of
from nvfp4_kernels.ops import _device, _tuned
from nvfp4_kernels.ops._triton import INTERPRETED, jit, launch, next_power_of_2, refuses_device, tl
from nvfp4_kernels.ops._triton_groups import find, picked
from nvfp4_kernels.ops._triton_numerics import apart, portable
from nvfp4_kernels.ops.grouped_matmul._triton_relu2 import write_relu2
from nvfp4_kernels.ops.matmul import _triton_block_scaled as fp4
from nvfp4_kernels.ops.matmul._triton_decoded import E4M3, EXACT, computed_in, load_plain, operand, second, tile
from nvfp4_kernels.ops.matmul._triton_tiles import CHANGES, Tile, write

SMALL = Tile(
    64, 64, 32, 4, 2, 1
)  # where codes meet a plain operand whose columns lie apart: addresses take the registers

# Of a tile of 128 rows: 64, and room for two programs on a processor. Groups end within tiles: of Nano's and Super's 8,192
# tokens 64 rows pad with 9%, 128 with 18%.
HALF = {"m": 64, "warps": 4, "stages": 2}

# Of programs that stay. Each still looks for its tiles and fills its pipeline anew, while programs a tile go wherever one has
# ended: that is the first choice.
STAYING = ({"programs": 1}, {"programs": 2})


def refuses(
    a: Stack | Columns, b: Stack | Columns, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None = None
) -> str | None:
    return "float64" if torch.float64 in (a.values.dtype, b.values.dtype, out_dtype) else refuses_device(a.values)


@jit
def step(
    sums, a_ptr, a_scales_ptr, row, rows, a_k, a_width, a_row_stride, a_step,
    b_ptr, b_scales_ptr, col, cols, b_k, b_width, b_row_stride, b_step, index_ptr, tokens,
    A: tl.constexpr, A_UNIT: tl.constexpr, B: tl.constexpr, B_UNIT: tl.constexpr, FP4: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, GATHERED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The sums with BLOCK_K more products each. GATHERED: of the columns of a plain b that the index names. TURNED: the rows of
    b in memory run along the columns, `col` is the first of these, and there are `cols` rows."""
    if FP4:
        a, a_scales = fp4.operand(a_ptr, a_scales_ptr, row, rows, a_k, a_width, a_row_stride, A_UNIT, BLOCK_K)
        b, b_scales = fp4.operand(b_ptr, b_scales_ptr, col, cols, b_k, b_width, b_row_stride, B_UNIT, BLOCK_K)
        return fp4.multiplied(a, a_scales, b, b_scales, sums)
    else:
        a = operand(a_ptr, a_scales_ptr, row, rows, a_k, a_width, a_row_stride, a_step, A, A_UNIT, COMPUTE, BLOCK_K)
        if GATHERED:
            token = picked(index_ptr, b_k + tl.arange(0, BLOCK_K), b_width, tokens)
            b = load_plain(b_ptr, col, cols, token, tokens, b_row_stride, b_step, COMPUTE)
        elif TURNED:
            line = b_k + tl.arange(0, BLOCK_K)
            b = operand(
                b_ptr, b_scales_ptr, line, cols, col, b_width, b_row_stride, b_step, B, B_UNIT, COMPUTE, sums.shape[1]
            )
            b = tl.trans(b)
        else:
            b = operand(b_ptr, b_scales_ptr, col, cols, b_k, b_width, b_row_stride, b_step, B, B_UNIT, COMPUTE, BLOCK_K)
        return tl.dot(a, tl.trans(apart(b) if B == "apart" else b), sums, input_precision=PRECISION)


@jit
def rows_kernel(
    a_ptr, a_scales_ptr, a_global_ptr, a_width, a_row_stride, a_step,
    b_ptr, b_scales_ptr, b_global_ptr, b_width, b_row_stride, b_step, b_stride, b_scales_stride,
    index_ptr, tokens, offsets_ptr, out_ptr, h_ptr, weights_ptr, squares_ptr, parts_ptr, amax_ptr, groups, rows, N, K,
    A: tl.constexpr, A_UNIT: tl.constexpr, B: tl.constexpr, B_UNIT: tl.constexpr, FP4: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, FINISH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr, GATHERED: tl.constexpr, TURNED: tl.constexpr, RELU2: tl.constexpr,
):  # fmt: skip
    """RELU2: None, or what write_relu2 is to do. A tile of rows meets all columns before the next one: a matrix stays in cache
    while its group's rows pass, and these are read from memory once. All tiles take equally long, so that any order has the
    longest first. Programs that are fewer than tiles take turns; what is the same for all of these is computed anew for each,
    for held in registers between them it spills."""
    across = tl.cdiv(N, BLOCK_N)
    tiles = (tl.cdiv(rows, BLOCK_M) + groups) * across
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        n = t % across * BLOCK_N
        group, _, end, first = find(offsets_ptr, groups, rows, t // across, BLOCK_M, BLOCK_G)
        if group < groups:
            row, a_rows = first + tl.arange(0, BLOCK_M), end
            col, cols = (n, K) if TURNED else (n + tl.arange(0, BLOCK_N), N)
            if GATHERED:
                row, a_rows = picked(index_ptr, row, end, tokens), tokens
            b_at = b_ptr + group.to(tl.int64) * b_stride
            b_scales_at = b_scales_ptr + group.to(tl.int64) * b_scales_stride
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k in range(0, K, BLOCK_K):
                sums = step(
                    sums, a_ptr, a_scales_ptr, row, a_rows, k, a_width, a_row_stride, a_step,
                    b_at, b_scales_at, col, cols, k, b_width, b_row_stride, b_step, index_ptr, tokens,
                    A, A_UNIT, B, B_UNIT, FP4, COMPUTE, PRECISION, BLOCK_K, False, TURNED,
                )  # fmt: skip
            b_global_at = b_global_ptr + group
            if RELU2 is None:
                write(sums, first, n, 0, end, N, a_global_ptr, b_global_at, out_ptr, out_ptr, out_ptr, FINISH, False)
            else:
                write_relu2(
                    sums, first, n, end, N, a_global_ptr, b_global_at,
                    out_ptr, h_ptr, weights_ptr, squares_ptr, parts_ptr, amax_ptr + group, groups, rows, FINISH, RELU2,
                )  # fmt: skip


@jit
def sums_kernel(
    a_ptr, a_scales_ptr, a_global_ptr, a_row_stride, a_step, a_starts_ptr,
    b_ptr, b_scales_ptr, b_global_ptr, b_row_stride, b_step, b_starts_ptr,
    index_ptr, tokens, longest_ptr, out_ptr, M, N,
    A: tl.constexpr, A_UNIT: tl.constexpr, B: tl.constexpr, B_UNIT: tl.constexpr, FP4: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, FINISH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATHERED: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BLOCK_N)
    m, n = tl.program_id(0) // across * BLOCK_M, tl.program_id(0) % across * BLOCK_N
    group = tl.load(longest_ptr + tl.program_id(1))
    row, col = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    a_first, a_end = tl.load(a_starts_ptr + group), tl.load(a_starts_ptr + group + 1)
    b_first, b_end = tl.load(b_starts_ptr + group), tl.load(b_starts_ptr + group + 1)
    a_first, b_first = tl.multiple_of(a_first, A_UNIT), tl.multiple_of(b_first, B_UNIT)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, tl.minimum(a_end - a_first, b_end - b_first), BLOCK_K):
        sums = step(
            sums, a_ptr, a_scales_ptr, row, M, a_first + k, a_end // A_UNIT, a_row_stride, a_step,
            b_ptr, b_scales_ptr, col, N, b_first + k, b_end // B_UNIT, b_row_stride, b_step, index_ptr, tokens,
            A, A_UNIT, B, B_UNIT, FP4, COMPUTE, PRECISION, BLOCK_K, GATHERED, False,
        )  # fmt: skip
    out_ptr += group * M * N
    write(sums, m, n, 0, M, N, a_global_ptr + group, b_global_ptr + group, out_ptr, out_ptr, out_ptr, FINISH, False)


def run(
    a: Stack | Columns, b: Stack | Columns, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None = None
) -> Tensor:
    return (multiply_rows if b.values.dim() == 3 else _sums)(a, b, offsets, out_dtype, rows)


@dataclass(frozen=True)
class _Side:
    """An operand as the kernels take it: codes in words, or in bytes for FP4 tensor cores."""

    format: str
    places: tuple[
        Tensor, Tensor, Tensor
    ]  # values, scales, global scales; plain values in the place of what is not there
    width: int  # of a line, in values
    unit: int  # values that a step along it takes at least
    scaled: bool  # by a global scale

    def strides(self, values: Tensor) -> tuple[int, int]:
        """From a line to the next, in units, and from a plain value to the next."""
        return (self.width // self.unit, 0) if self.format in ("nvfp4", "mxfp8") else values.stride()[-2:]


def _format(x: Stack | Columns) -> str:
    return str(x.values.dtype)[6:] if x.scales is None else "mxfp8" if x.global_scales is None else "nvfp4"


def _side(x: Stack | Columns, cores: bool, units: tuple[int, ...], block: int) -> _Side:
    kind, scaled = _format(x), x.global_scales is not None
    if x.scales is None:
        values = portable(x.values.view(torch.uint8) if kind == E4M3 else x.values)
        places = values, values, x.global_scales.contiguous() if scaled else values
        return _Side(kind, places, values.shape[-1], 1, scaled)
    codes, scales = x.values.contiguous(), x.scales.contiguous().view(torch.uint8)
    width = codes.shape[-1] * (2 if kind == "nvfp4" else 1)
    unit = 32 if kind == "mxfp8" else next(u for u in units if width % u == 0 and block % u == 0)
    if cores:
        return _Side(kind, (codes, scales.view(torch.float8_e4m3fn), x.global_scales.contiguous()), width, unit, True)
    words = codes.view(torch.int32)
    return _Side(kind, (words, scales, x.global_scales.contiguous() if scaled else scales), width, unit, scaled)


def multiply_rows(
    a: Stack, b: Stack, offsets: Tensor, out_dtype: torch.dtype, index: Tensor | None, squared: bool = False
) -> Tensor:
    """squared: relu2 of the products, in fp32 before they are rounded."""
    y = torch.empty(len(a.values if index is None else index), rows_of(b), dtype=out_dtype, device=a.values.device)
    write_rows(a, b, offsets, y, index, squared)
    return y


def write_rows(a: Stack, b: Stack, offsets: Tensor, y: Tensor, index: Tensor | None, squared: bool) -> None:
    """Rows offsets[0] to offsets[-1] of y: those of the matrices that b has. b may be plain under global scales."""
    launch_rows(rows_form(a, b, len(y), squared), a, b, offsets, index, y, (None,) * 5, None)


def rows_form(a: Stack, b: Stack, rows: int, squared: bool = False):
    """_form's for `rows` rows in groups."""
    groups = max(len(b.values), 1)
    return _form(-(-rows // groups), rows_of(b), a, b, (256, 64, 16), squared=squared)


def launch_rows(form, a: Stack, b: Stack, offsets: Tensor, index: Tensor | None, y: Tensor, places, relu2) -> None:
    """The products of rows to y. form: of rows_form. places: write_relu2's tensors, None for those that are not there; relu2:
    what it is to do, or None."""
    (t, (left, right), constants), (rows, N), groups = form, y.shape, len(b.values)
    values, scales, _ = right.places
    y, tiles = portable(y), (-(-rows // t.m) + groups) * -(-N // t.n)
    launch(
        rows_kernel,
        (min(tiles, t.programs * _device.multiprocessors(y.device)) if t.programs else tiles,),
        *(*left.places, left.width // left.unit, *left.strides(a.values)),
        *(*right.places, right.width // right.unit, *right.strides(b.values)),
        *(values.stride(0), 0 if b.scales is None else scales.stride(0)),
        *(offsets if index is None else index, len(a.values)),
        *(offsets, y, *(y if x is None else portable(x) for x in places), groups, rows, N),
        min(left.width, b.values.shape[1] if b.turned else right.width),
        **constants,
        TURNED=b.turned,
        BLOCK_G=next_power_of_2(groups),
        GATHERED=index is not None,
        RELU2=relu2,
    )


def _sums(
    a: Stack | Columns, b: Stack | Columns, offsets: Tensor, out_dtype: torch.dtype, index: Tensor | None
) -> Tensor:
    groups, M, N = len(offsets) - 1, len(a.values), len(b.values)
    if 0 in (a.values.shape[1], b.values.shape[1]):
        return torch.zeros(groups, M, N, dtype=out_dtype, device=a.values.device)
    y = torch.empty(groups, M, N, dtype=out_dtype, device=a.values.device)
    mixed = (a.scales is None) != (b.scales is None)
    t, sides, constants = _form(M, N, a, b, (16,), SMALL if mixed else None)  # groups begin at any block
    arguments = []
    for x, side in zip((a, b), sides, strict=True):
        starts = x.starts if isinstance(x, Columns) else offsets
        arguments += *side.places, *side.strides(x.values), starts
    longest = offsets.diff().argsort(descending=True)  # first, so that no long sum begins when the others are over
    launch(
        sums_kernel,
        (-(-M // t.m) * -(-N // t.n), groups),
        *(*arguments, offsets if index is None else index, b.values.shape[1], longest, portable(y), M, N),
        # stages are split between an index and what it names
        **constants | dict(num_stages=t.stages if index is None else 2 * t.stages - 1),
        GATHERED=index is not None,
    )
    return y


def _form(
    M: int, N: int, a: Stack | Columns, b: Stack | Columns, units: tuple[int, ...], t: Tile | None = None,
    squared: bool = False,
):  # fmt: skip
    """The tile for products of this size, the operands, and what the kernels are compiled for. Fused multiply-adds change no
    bits here: the products are the tensor cores'. Two operands that are decoded leave no registers for tiles of 128 x 256, nor
    does FP8."""
    formats, device, turned = (_format(a), _format(b)), a.values.device, isinstance(b, Stack) and b.turned
    cores = _device.fp4_tensor_cores(device) if formats == ("nvfp4", "nvfp4") and not turned else None
    compute = computed_in(*formats)
    dtype, _, precision = EXACT[compute]
    if INTERPRETED:
        dtype, precision = torch.float32, "ieee"
    if cores:
        t = fp4.tile(M, N, b.values.shape[-1], cores)
    elif t is None:
        room = (a.scales is None or b.scales is None) and E4M3 not in formats
        most = M if room else min(M, 256)
        t = tile(most, N, b.values.shape[-1], compute, _device.matrix_instruction(device))
    kind = "rows" if b.values.dim() == 3 else "sums"
    changes = (*CHANGES, *STAYING) if kind == "rows" else CHANGES
    if kind == "rows" and t.m == 128 and not cores:
        changes += (HALF,)
    t = _tuned.tile(t, changes, device, "grouped_matmul", kind, *formats)
    left, right = sides = [
        _side(x, bool(cores), units if cores else units[-2:], block)
        for x, block in ((a, t.k), (b, t.n if turned else t.k))
    ]
    gain = 1.0 if cores else 512.0 ** ((left.format == "nvfp4") + (right.format == "nvfp4"))
    b_format = second(right.format, device)
    constants = dict(A=left.format, A_UNIT=left.unit, B=b_format, B_UNIT=right.unit, FP4=bool(cores))
    constants |= dict(COMPUTE=getattr(tl, str(dtype)[6:]), PRECISION=precision)
    constants |= dict(FINISH=(gain, left.scaled, right.scaled, False, False, squared))
    return (
        t,
        sides,
        constants | dict(BLOCK_M=t.m, BLOCK_N=t.n, BLOCK_K=t.k, num_warps=t.warps, num_stages=t.stages, fusion=False),
    )

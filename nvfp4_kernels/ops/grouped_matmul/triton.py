"""Groups of products in Triton, as the product of decoded operands (ops/matmul/_triton_decoded.py), one launch for all groups.

Where the groups' rows begin is on the device and stays there: as many programs start as the rows could need in the worst case,
a tile more for each group than for rows without groups, and each finds its group, or that there is nothing left for it, from
the offsets. Sums that are divided among groups run from one offset to the next, a program a tile of one group.
"""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops._triton import INTERPRETED, jit, launch, next_power_of_2, refuses_device, tl
from nvfp4_kernels.ops._triton_numerics import portable
from nvfp4_kernels.ops.matmul._triton_decoded import EXACT, computed_in, operand, tile
from nvfp4_kernels.ops.matmul._triton_tiles import write


def refuses(a: Tensor, b: Stack, offsets: Tensor, out_dtype: torch.dtype) -> str | None:
    return "float64" if torch.float64 in (a.dtype, b.values.dtype, out_dtype) else refuses_device(a)


@jit
def find(offsets_ptr, groups, place, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """(group, first row of the tile, end of the group's rows) of the place-th tile of rows; beyond the last, group `groups`."""
    group = tl.arange(0, BLOCK_G)
    start = tl.load(offsets_ptr + group, group < groups, 0)
    end = tl.load(offsets_ptr + group + 1, group < groups, 0)
    tiles = tl.cdiv(end - start, BLOCK_M)
    last = tl.cumsum(tiles, 0)
    mine = tl.sum(((last <= place) & (group < groups)).to(tl.int32), 0)
    picked = group == mine
    row = tl.sum(tl.where(picked, start + (place - (last - tiles)) * BLOCK_M, 0), 0)
    return mine, row, tl.sum(tl.where(picked, end, 0), 0)


@jit
def rows_kernel(
    a_ptr, a_width, a_row_stride, a_step, b_ptr, b_scales_ptr, b_global_ptr, b_width, b_stride, b_row_stride, b_step,
    offsets_ptr, out_ptr, groups, N, K,
    A: tl.constexpr, B: tl.constexpr, B_UNIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    FINISH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    group, first, end = find(offsets_ptr, groups, tl.program_id(0), BLOCK_M, BLOCK_G)
    if group < groups:
        n = tl.program_id(1) * BLOCK_N
        row, col = first + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        b_ptr += group.to(tl.int64) * b_stride
        if B == "nvfp4":
            b_scales_ptr += group.to(tl.int64) * N * b_width * (B_UNIT // 16)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            a = operand(a_ptr, a_ptr, row, end, k, a_width, a_row_stride, a_step, A, 1, COMPUTE, BLOCK_K)
            b = operand(b_ptr, b_scales_ptr, col, N, k, b_width, b_row_stride, b_step, B, B_UNIT, COMPUTE, BLOCK_K)
            sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION)
        write(
            sums, first, n, 0, end, N, b_global_ptr, b_global_ptr + group, out_ptr, out_ptr, out_ptr, FINISH, False
        )  # fmt: skip


@jit
def sums_kernel(
    a_ptr, a_row_stride, a_step, b_ptr, b_row_stride, b_step, offsets_ptr, out_ptr, M, N,
    A: tl.constexpr, B: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, FINISH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BLOCK_N)
    m, n = tl.program_id(0) // across * BLOCK_M, tl.program_id(0) % across * BLOCK_N
    group = tl.program_id(1).to(tl.int64)
    row, col = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    end = tl.load(offsets_ptr + group + 1)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(tl.load(offsets_ptr + group), end, BLOCK_K):
        a = operand(a_ptr, a_ptr, row, M, k, end, a_row_stride, a_step, A, 1, COMPUTE, BLOCK_K)
        b = operand(b_ptr, b_ptr, col, N, k, end, b_row_stride, b_step, B, 1, COMPUTE, BLOCK_K)
        sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION)
    out_ptr += group * M * N
    write(sums, m, n, 0, M, N, out_ptr, out_ptr, out_ptr, out_ptr, out_ptr, FINISH, False)


def run(a: Tensor, b: Stack, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    return _rows(a, b, offsets, out_dtype) if b.values.dim() == 3 else _sums(a, b.values, offsets, out_dtype)


def _rows(a: Tensor, b: Stack, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    (rows, K), (groups, N) = a.shape, b.values.shape[:2]
    y = torch.empty(rows, N, dtype=out_dtype, device=a.device)
    a_format, b_format = str(a.dtype)[6:], str(b.values.dtype)[6:] if b.scales is None else "nvfp4"
    t, constants = _form(-(-rows // max(groups, 1)), N, K, a_format, b_format, a.device)
    if b.scales is None:
        values, unit = portable(b.values), 1
        right = values, values, values, K, *values.stride()
    else:
        unit = 64 if K % 64 == 0 and t.k % 64 == 0 else 16
        codes, scales = b.values.contiguous().view(torch.int32), b.scales.contiguous().view(torch.uint8)
        right = codes, scales, b.global_scales.contiguous(), K // unit, N * (K // 8), 0, 0
    launch(
        rows_kernel,
        (-(-rows // t.m) + groups, -(-N // t.n)),
        *(portable(a), K, *a.stride(), *right, offsets, portable(y), groups, N, K),
        **dict(B_UNIT=unit, FINISH=(512.0 if unit > 1 else 1.0, False, unit > 1, False, False)),
        **constants,
        BLOCK_G=next_power_of_2(groups),
    )
    return y


def _sums(a: Tensor, b: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    groups, M, N = len(offsets) - 1, len(a), len(b)
    y = torch.empty(groups, M, N, dtype=out_dtype, device=a.device)
    t, constants = _form(M, N, a.shape[1], str(a.dtype)[6:], str(b.dtype)[6:], a.device)
    launch(
        sums_kernel,
        (-(-M // t.m) * -(-N // t.n), groups),
        *(portable(a), *a.stride(), portable(b), *b.stride(), offsets, portable(y), M, N),
        FINISH=(1.0, False, False, False, False),
        **constants,
    )
    return y


def _form(M: int, N: int, K: int, a: str, b: str, device: torch.device):
    """The tile for products of this size, and what the kernels are compiled for. Fused multiply-adds change no bits here: the
    products are the tensor cores'."""
    compute = computed_in(a, b)
    dtype, _, precision = EXACT[compute]
    if INTERPRETED:
        dtype, precision = torch.float32, "ieee"
    t = tile(M, N, K, compute, _device.matrix_instruction(device))
    constants = dict(A=a, B=b, COMPUTE=getattr(tl, str(dtype)[6:]), PRECISION=precision)
    return t, constants | dict(
        BLOCK_M=t.m, BLOCK_N=t.n, BLOCK_K=t.k, num_warps=t.warps, num_stages=t.stages, fusion=False
    )

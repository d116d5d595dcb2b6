"""What both products share: operands as the kernels take them, which tile of y a program takes, how far along K, and the
way from the fp32 sums to y.

K may be split between programs; each then leaves its sums in `partial` [splits, M, N], fp32, and finish_kernel adds them in
order: the same bits on every run.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.ops._triton import jit, launch, tl
from nvfp4_kernels.ops._triton_numerics import as_fp32, portable, readable, rounded

PROGRAMS = 264  # two for each of H200's processors; one number for all devices, so that all of them give the same bits


@dataclass(frozen=True)
class Side:
    """One operand. codes: int32 words of codes, or a plain tensor; length: values of a row, padding included."""

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None
    format: str  # "nvfp4", "mxfp8", or the plain dtype's name
    length: int
    strides: tuple[int, int] | None = None  # of a plain tensor

    @property
    def rows(self) -> int:
        return self.codes.shape[0]


def side(x: NVFP4Tensor | MXFP8Tensor | Tensor) -> Side:
    if isinstance(x, Tensor):
        return plain_side(x, None)
    nvfp4 = isinstance(x, NVFP4Tensor)
    codes, scales = x.codes.contiguous(), x.scales.contiguous().view(torch.uint8)
    length = codes.shape[1] * (2 if nvfp4 else 1)
    global_scale = x.global_scale if nvfp4 else None
    return Side(codes.view(torch.int32), scales, global_scale, "nvfp4" if nvfp4 else "mxfp8", length)


def plain_side(x: Tensor, global_scale: Tensor | None) -> Side:
    """A plain operand; global_scale: what its products are still to be multiplied by."""
    values = portable(x)
    return Side(values, values, global_scale, str(x.dtype)[6:], x.shape[1], x.stride())


@dataclass(frozen=True)
class Tile:
    """What a program multiplies in one step, and how K is split. warps, stages: Triton's num_warps and num_stages. programs: on
    a processor, of a kernel whose programs stay; 0: a program a tile.

    str() leaves out the splits, which differ from problem to problem: it names a kind of them (ops/_tuned.py).
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    splits: int = field(repr=False)
    programs: int = field(default=0, repr=False)


# Of a product's tile. K is summed in the same steps and splits by the same instruction: the same bits.
CHANGES = ({}, {"stages": 4}, {"stages": 2}, {"n": 64}, {"n": 128})


def blocks_to_fill(M: int, N: int, K: int, m: int, n: int, k: int) -> int:
    """Splits of K: as many as it takes to occupy the device, each at least 4 steps long, which pay for the sums' detour."""
    tiles, steps = max(1, -(-M // m) * -(-N // n)), -(-K // k)
    return max(1, min(steps // 4, PROGRAMS // tiles))


@jit
def place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first row, first column, split) of this program. Eight tiles of rows share a column of tiles while it is in cache."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (8 * across)
    height = tl.minimum(down - group * 8, 8)
    m = group * 8 + pid % (8 * across) % height
    n = pid % (8 * across) // height
    return m * BLOCK_M, n * BLOCK_N, tl.program_id(1)


@jit
def scaled(sums, a_global_ptr, b_global_ptr, FINISH: tl.constexpr):
    """The sums times the gain, a power of two, and the global scales, of which one that is not finite makes them NaN. FINISH:
    (gain, a has a global scale, b has one, ...)."""
    g = tl.full([], 1.0, tl.float32)
    if FINISH[1]:
        g = g * tl.load(a_global_ptr)
    if FINISH[2]:
        g = g * tl.load(b_global_ptr)
    g = tl.where(tl.abs(g) <= 3.4028234663852886e38, g, float("nan"))
    return sums * FINISH[0] * g


@jit
def write(
    sums, m, n, split, M, N, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, partial_ptr,
    FINISH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The sums of a tile to `partial`, or, finished, to out. FINISH: `scaled` reads the first three; then whether there is a
    bias, out is added to, relu2 is taken."""
    row, col = m + tl.arange(0, sums.shape[0]), n + tl.arange(0, sums.shape[1])
    inside = (row < M)[:, None] & (col < N)[None, :]
    at = row[:, None].to(tl.int64) * N + col[None, :]
    if SPLIT:
        tl.store(partial_ptr + tl.cast(split, tl.int64) * M * N + at, sums, inside)
    else:
        y = scaled(sums, a_global_ptr, b_global_ptr, FINISH)
        if FINISH[3]:
            y += as_fp32(tl.load(bias_ptr + col, col < N, 0))[None, :]
        if FINISH[5]:
            y = tl.where(y < 0, 0.0, y)  # NaN stays
            y = y * y
        if FINISH[4]:
            y += tl.load(out_ptr + at, inside, 0.0)
        tl.store(out_ptr + at, rounded(y, out_ptr), inside)


@jit
def finish_kernel(
    partial_ptr, splits, M, N, a_global_ptr, b_global_ptr, bias_ptr, out_ptr,
    FINISH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BLOCK_N)
    m, n = tl.program_id(0) // across * BLOCK_M, tl.program_id(0) % across * BLOCK_N
    row, col = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    inside = (row < M)[:, None] & (col < N)[None, :]
    at = partial_ptr + row[:, None].to(tl.int64) * N + col[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for split in range(splits):
        sums += tl.load(at + tl.cast(split, tl.int64) * M * N, inside, 0.0)
    write(sums, m, n, 0, M, N, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, partial_ptr, FINISH, False)


def multiply_tiles(
    kernel, tile: Tile, K: int, a: tuple, b: tuple, bias: Tensor | None, out: Tensor, gain: float, accumulate: bool,
    **constants,
) -> None:  # fmt: skip
    """Launch a product, and the addition of its splits. a, b: the kernel's arguments for the operands; their third is the
    global scale or None."""
    M, N = out.shape
    splits, steps = tile.splits, -(-K // tile.k)
    steps = -(-steps // splits)
    partial = torch.empty(splits, M, N, dtype=torch.float32, device=out.device) if splits > 1 else out
    finish = (gain, a[2] is not None, b[2] is not None, bias is not None, accumulate, False)
    a, b = ((x[0], x[1], x[1] if x[2] is None else x[2], *x[3:]) for x in (a, b))
    y = portable(out)
    bias = y if bias is None else readable(bias.contiguous())
    launch(
        kernel,
        (-(-M // tile.m) * -(-N // tile.n), splits),
        *(*a, *b, bias, y, partial if splits > 1 else y, M, N, K, steps),
        **dict(FINISH=finish, SPLIT=splits > 1, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k),
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        fusion=False,
    )
    if splits > 1:
        launch(
            finish_kernel,
            (-(-M // 16) * -(-N // 64),),
            *(partial, splits, M, N, a[2], b[2], bias, y),
            **dict(FINISH=finish, BLOCK_M=16, BLOCK_N=64),
            num_warps=4,
            fusion=False,
        )

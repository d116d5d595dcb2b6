"""NVFP4 x NVFP4 on FP4 tensor cores: tl.dot_scaled with E4M3 block scales, which becomes tcgen05.mma kind::mxf4nvf4 on
sm_100 and sm_103 and mma.sync kind::mxf4nvf4 on sm_120.

Bytes a value of an operand: 0.5625. The interpreter's dot_scaled takes E4M3 scales for E8M0: there the operands are decoded.
"""

import torch

from nvfp4_kernels.ops import _tuned
from nvfp4_kernels.ops._triton import jit, tl
from nvfp4_kernels.ops._triton_numerics import WRITTEN_OUT, apart, e2m1_value, e4m3_value
from nvfp4_kernels.ops.matmul._triton_tiles import CHANGES, Side, Tile, blocks_to_fill, multiply_tiles, place, write


def tile(M: int, N: int, K: int, cores: str) -> Tile:
    """tcgen05 multiplies 128 rows at a time, whatever M is, and its sums lie in tensor memory: 128 x 256, 256 values deep,
    keep it fed. mma.sync has 99 KB of shared memory and sums in registers: 128 x 128, 128 deep."""
    if cores == "tcgen05":
        block = (128, 128, 256, 4) if M <= 128 or N <= 128 else (128, 256, 256, 8)
    else:
        block = (16 if M <= 16 else 128, 128, 128, 4 if M <= 16 else 8)
    return Tile(*block, 3, blocks_to_fill(M, N, K, *block[:3]))


@jit
def operand(codes_ptr, scales_ptr, row, rows, k, units, stride, UNIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bytes [rows, BLOCK_K / 2] and scales [rows, BLOCK_K / 16], zero beyond the operand. A row is `units` long, of UNIT values
    each; the next is `stride` units on."""
    line, inside = row[:, None].to(tl.int64), (row < rows)[:, None]
    c, s = k // 2 + tl.arange(0, BLOCK_K // 2), k // 16 + tl.arange(0, BLOCK_K // 16)
    width, stride = units * (UNIT // 16), stride * (UNIT // 16)
    codes = tl.load(codes_ptr + line * (stride * 8) + c[None, :], inside & (c < width * 8)[None, :], 0)
    scales = tl.load(scales_ptr + line * stride + s[None, :], inside & (s < width)[None, :], 0.0)
    return codes, scales


@jit
def decoded(codes, scales):
    x = tl.join(e2m1_value(codes.to(tl.int32) & 15), e2m1_value(codes.to(tl.int32) >> 4))
    x = tl.reshape(x, [codes.shape[0], scales.shape[1], 16])
    decode = e4m3_value(scales.to(tl.uint8, bitcast=True).to(tl.int32))
    return tl.reshape(x * decode[:, :, None], [codes.shape[0], codes.shape[1] * 2])


@jit
def multiplied(a, a_scales, b, b_scales, sums):
    if WRITTEN_OUT:
        return tl.dot(decoded(a, a_scales), tl.trans(decoded(b, b_scales)), sums, input_precision="ieee")
    else:
        return tl.dot_scaled(a, a_scales, "e2m1", tl.trans(apart(b)), b_scales, "e2m1", sums)


@jit
def block_scaled_kernel(
    a_ptr, a_scales_ptr, a_global_ptr, a_width, b_ptr, b_scales_ptr, b_global_ptr, b_width,
    bias_ptr, out_ptr, partial_ptr, M, N, K, steps,
    UNIT: tl.constexpr, FINISH: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n, split = place(M, N, BLOCK_M, BLOCK_N)
    row, col = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * steps, tl.minimum(split * steps + steps, tl.cdiv(K, BLOCK_K))):
        a, a_scales = operand(a_ptr, a_scales_ptr, row, M, step * BLOCK_K, a_width, a_width, UNIT, BLOCK_K)
        b, b_scales = operand(b_ptr, b_scales_ptr, col, N, step * BLOCK_K, b_width, b_width, UNIT, BLOCK_K)
        sums = multiplied(a, a_scales, b, b_scales, sums)
    write(sums, m, n, split, M, N, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, partial_ptr, FINISH, SPLIT)


def multiply(a: Side, b: Side, bias, out: torch.Tensor, accumulate: bool, cores: str) -> None:
    K = a.length
    unit = next(
        unit for unit in (256, 64, 16) if K % unit == 0
    )  # a row's length in units: the wider, the wider the loads
    sides = ((x.codes.view(torch.uint8), x.scales.view(torch.float8_e4m3fn), x.global_scale, K // unit) for x in (a, b))
    multiply_tiles(
        block_scaled_kernel,
        _tuned.tile(tile(out.shape[0], out.shape[1], K, cores), CHANGES, out.device, "matmul", cores),
        K,
        *sides,
        bias,
        out,
        1.0,
        accumulate,
        UNIT=unit,
    )

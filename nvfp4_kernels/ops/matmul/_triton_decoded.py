"""The product of decoded operands: each tile becomes bf16 (or fp16, or fp32) in registers, exactly, for tl.dot.

An NVFP4 value under its block scale has 6 significant bits at most and an MXFP8 value 4: both are exact in bf16, NVFP4 in
fp16 too, and bf16 and fp16 together in tf32. What is exact decides what the tensor cores are given; a plain fp32 operand
goes in three products of tf32 parts, 22 of its 24 bits. The interpreter's dot is right in fp32 only.

NVFP4 comes out of registers as 2^-9 of its value under the block scale: bf16 (and fp32) reads the shifted magnitude bits as
2^-126 of the code's value, and 2^117 is as much as the scale's own exponent leaves room for. The sums make up for it. Two
values an instruction: 5.2 SASS instructions a weight in the loop for 16 rows of bf16 (sm_90), where one value an instruction
takes 6.8; H200 issues about 4 in the time that a weight takes to arrive. Source: the shifts of Marlin's decoding.
"""

import torch

from nvfp4_kernels.ops import _device, _tuned
from nvfp4_kernels.ops._triton import INTERPRETED, jit, tl
from nvfp4_kernels.ops._triton_numerics import (
    apart,
    as_fp32,
    bf16_pair,
    by_registers,
    e2m1_bits,
    e4m3_value,
    e8m0_value,
    eighths_joined,
    quarters_joined,
)
from nvfp4_kernels.ops.matmul._triton_tiles import CHANGES, Side, Tile, blocks_to_fill, multiply_tiles, place, write

E4M3 = "float8_e4m3fn"
EXACT = {  # formats that are exact in what the tensor cores multiply, and tl.dot's name for the precision
    "bfloat16": (torch.bfloat16, {"nvfp4", "mxfp8", E4M3, "bfloat16"}, "tf32"),
    "float16": (torch.float16, {"nvfp4", E4M3, "float16"}, "tf32"),
    "tf32": (torch.float32, {"nvfp4", "mxfp8", E4M3, "bfloat16", "float16"}, "tf32"),
    "float32": (torch.float32, {"nvfp4", "mxfp8", E4M3, "bfloat16", "float16", "float32"}, "tf32x3"),
}


def computed_in(a: str, b: str) -> str:
    """The fastest of EXACT in which both formats are exact."""
    return next(name for name, (_, formats, _) in EXACT.items() if {a, b} <= formats)


def tile(M: int, N: int, K: int, compute: str, instruction: str) -> Tile:
    """What a program takes. 16-bit operands: few rows of a meet long stretches of b, whose codes are what has to be read;
    many rows a square that the tensor cores can be kept busy with, 128 x 256 where their sums leave registers for it.
    Each fp32 product is three of tf32, for whose parts the registers have room in a square of 64 x 64.
    """
    if compute == "float32":
        block, stages = (16 if M <= 16 else 64, 64, 32, 4), 2
    elif compute == "tf32":
        block, stages = (128, 128, 32, 8), 3
    elif M <= 64:
        block, stages = (16 if M <= 16 else 32, 128, 128, 8) if M <= 32 else (64, 128, 64, 4), 3
    elif instruction == "mma.sync" or M <= 256 or N <= 256:
        block, stages = (128, 128, 64, 8), 3
    else:
        block, stages = (128, 256, 64, 8), 3
    return Tile(*block, stages, blocks_to_fill(M, N, K, *block[:3]))


@jit
def bf16_values(word, scales):
    """Codes 3 and 7 of a word, times a pair of scales (as one word), in bf16: 2^-126 of the product.

    The upper half's shift brings the sign along, the lower half's is added. Subnormal bf16 operands count in full
    (PTX ISA, fma), and adding -0 makes a product of the sum on sm_80, which has no other.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 magnitudes, sign, pair;
        shr.s32 magnitudes, $2, 6;
        and.b32 magnitudes, magnitudes, 0x81c001c0;
        and.b32 sign, $2, 0x8000;
        or.b32 pair, magnitudes, sign;
        mov.b32 sign, 0x80008000;
        fma.rn.bf16x2 pair, pair, $3, sign;
        mov.b32 {$0, $1}, pair;
        }""",
        "=h,=h,r,r",
        [word, scales],
        (tl.bfloat16, tl.bfloat16),
        True,
        1,
    )


@jit
def bf16_decoded(word, scale):
    """The eight codes of a word times a scale (fp32), in bf16: 2^-9 of the products."""
    decode = scale * 1.661534994731145e35  # 2^117
    pair = bf16_pair(decode, decode)
    v04, v15 = bf16_values(word << 12, pair), bf16_values(word << 8, pair)
    v26, v37 = bf16_values(word << 4, pair), bf16_values(word, pair)
    return v04[0], v15[0], v26[0], v37[0], v04[1], v15[1], v26[1], v37[1]


@jit
def load_nvfp4(
    codes_ptr, scales_ptr, row, rows, k, units, stride, UNIT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """[rows, BLOCK_K], 2^-9 of the values under the block scales. A row is `units` long, of UNIT values each: 64 make for
    wide loads, and for words of four scales, below which there are no asynchronous copies. The next is `stride` units on."""
    line, inside = row[:, None].to(tl.int64), (row < rows)[:, None]
    w = k // 8 + tl.arange(0, BLOCK_K // 8)
    words = units * (UNIT // 8)
    word = tl.load(codes_ptr + line * (stride * (UNIT // 8)) + w[None, :], inside & (w < words)[None, :], 0)
    if UNIT == 64:
        s = k // 64 + tl.arange(0, BLOCK_K // 64)
        at = scales_ptr.to(tl.pointer_type(tl.int32)) + line * stride + s[None, :]
        four = tl.load(at, inside & (s < units)[None, :], 0)
        # of the eight words under four scales each two share one
        scale = tl.reshape(four[:, :, None] >> (tl.arange(0, 8) // 2 * 8)[None, None, :], word.shape) & 255
    else:
        scale = tl.load(scales_ptr + line * stride + (w // 2)[None, :], inside & (w < words)[None, :], 0).to(tl.int32)
    if COMPUTE == tl.bfloat16:
        x = bf16_decoded(word, e4m3_value(scale))
    else:
        decode, x = e4m3_value(scale) * 1.661534994731145e35, ()
        for j in tl.static_range(8):
            x += ((e2m1_bits(word, j) * decode).to(COMPUTE),)
    return apart(tl.reshape(eighths_joined(x), [row.shape[0], BLOCK_K]))


@jit
def load_mxfp8(
    codes_ptr, scales_ptr, row, rows, k, units, stride, UNIT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """[rows, BLOCK_K]."""
    line = row[:, None].to(tl.int64)
    w = k // 4 + tl.arange(0, BLOCK_K // 4)
    words = units * (UNIT // 4)
    inside = (row < rows)[:, None] & (w < words)[None, :]
    word = tl.load(codes_ptr + line * (stride * (UNIT // 4)) + w[None, :], inside, 0)
    scale = tl.load(scales_ptr + line * (stride * (UNIT // 32)) + (w // 8)[None, :], inside, 0).to(tl.int32)
    decode, x = e8m0_value(scale), ()
    for j in tl.static_range(4):
        x += ((e4m3_value(word >> (8 * j)) * decode).to(COMPUTE),)
    return apart(tl.reshape(quarters_joined(x), [row.shape[0], BLOCK_K]))


@jit
def load_plain(x_ptr, row, rows, col, cols, row_stride, step, COMPUTE: tl.constexpr):
    """[rows, columns], whichever they are, zero where there are none. Bytes are E4M3."""
    at = x_ptr + row[:, None].to(tl.int64) * row_stride + col[None, :].to(tl.int64) * step
    x = tl.load(at, (row < rows)[:, None] & (col < cols)[None, :], 0)
    if x.dtype == tl.uint8:
        return e4m3_value(x.to(tl.int32)).to(COMPUTE)
    else:
        return as_fp32(x) if COMPUTE == tl.float32 else x


@jit
def operand(
    x_ptr, scales_ptr, row, rows, k, width, row_stride, step,
    FORMAT: tl.constexpr, UNIT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_K] in COMPUTE, zero beyond the operand, which is `width` units of UNIT values wide; row_stride in units."""
    if FORMAT == "nvfp4":
        return load_nvfp4(x_ptr, scales_ptr, row, rows, k, width, row_stride, UNIT, COMPUTE, BLOCK_K)
    elif FORMAT == "mxfp8":
        return load_mxfp8(x_ptr, scales_ptr, row, rows, k, width, row_stride, UNIT, COMPUTE, BLOCK_K)
    else:
        return load_plain(x_ptr, row, rows, k + tl.arange(0, BLOCK_K), width, row_stride, step, COMPUTE)


@jit
def decoded_kernel(
    a_ptr, a_scales_ptr, a_global_ptr, a_width, a_row_stride, a_step,
    b_ptr, b_scales_ptr, b_global_ptr, b_width, b_row_stride, b_step,
    bias_ptr, out_ptr, partial_ptr, M, N, K, steps,
    A: tl.constexpr, A_UNIT: tl.constexpr, B: tl.constexpr, B_UNIT: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, FINISH: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n, split = place(M, N, BLOCK_M, BLOCK_N)
    row, col = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * steps, tl.minimum(split * steps + steps, tl.cdiv(K, BLOCK_K))):
        k = step * BLOCK_K
        a = operand(a_ptr, a_scales_ptr, row, M, k, a_width, a_row_stride, a_step, A, A_UNIT, COMPUTE, BLOCK_K)
        b = operand(b_ptr, b_scales_ptr, col, N, k, b_width, b_row_stride, b_step, B, B_UNIT, COMPUTE, BLOCK_K)
        sums = tl.dot(a, tl.trans(apart(b) if B == "apart" else b), sums, input_precision=PRECISION)
    write(sums, m, n, split, M, N, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, partial_ptr, FINISH, SPLIT)


def second(format: str, device: torch.device) -> str:
    """B, the second operand's format as kernels take it; "apart": a plain one that goes by way of registers."""
    plain = format not in ("nvfp4", "mxfp8")
    return "apart" if plain and by_registers(device) else format


def unit(x: Side, t: Tile) -> int:
    """How many values make a unit of the operand's row; a step along K takes whole units."""
    choices = {"nvfp4": (64, 16), "mxfp8": (32,)}.get(x.format, (1,))
    return next(choice for choice in choices if x.length % choice == 0 and t.k % choice == 0)


def multiply(a: Side, b: Side, bias, out: torch.Tensor, accumulate: bool) -> None:
    compute = computed_in(a.format, b.format)
    dtype, _, precision = EXACT[compute]
    if INTERPRETED:
        dtype, precision = torch.float32, "ieee"
    K = min(a.length, b.length)  # beyond it one operand, or both, would have zeros
    t = tile(out.shape[0], out.shape[1], K, compute, _device.matrix_instruction(out.device))
    t = _tuned.tile(t, CHANGES, out.device, "matmul", a.format, b.format)
    units = [unit(x, t) for x in (a, b)]
    multiply_tiles(
        decoded_kernel,
        t,
        K,
        *(
            (x.codes, x.scales, x.global_scale, x.length // u, *(x.strides or (x.length // u, 0)))
            for x, u in zip((a, b), units, strict=True)
        ),
        bias,
        out,
        512.0 ** ((a.format == "nvfp4") + (b.format == "nvfp4")),
        accumulate,
        **dict(A=a.format, A_UNIT=units[0], B=second(b.format, out.device), B_UNIT=units[1]),
        **dict(COMPUTE=getattr(tl, str(dtype)[6:]), PRECISION=precision),
    )

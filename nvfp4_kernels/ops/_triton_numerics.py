"""The format in Triton, the statement of csrc/numerics once more: E2M1, E4M3, bf16, Philox and the Hadamard transform.

A run of 16 values is a tuple of 16 tensors, value j in tensor j: a thread holds whole runs, so that an amax, a butterfly or
a packed word takes no other thread. Rounding is written in fp32 sums and integers: sm_80 converts to no FP8, and Triton's
interpreter converts wrongly. No expression here may be contracted: launch with fusion=False.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops._triton import INTERPRETED, jit, tl, version
from nvfp4_kernels.ops._triton_groups import picked

WRITTEN_OUT = tl.constexpr(INTERPRETED)  # the interpreter runs no inline assembly
# Triton 3.6 looks further around tensor cores' operands and sums than it can go: "Illegal shared layout" of a reshaped operand
# (TritonGPUOptimizeDotOperands), "parent layout must have at least rank >= 2" of a reduction (its OptimizeTMemLayouts).
MOVES = tl.constexpr(not INTERPRETED and version[:2] == (3, 6))
# Before 3.7.1 it fences what threads store to shared memory before tensor cores read it, but no asynchronous copies to there.
UNFENCED = tl.constexpr(not INTERPRETED and version < (3, 7, 1))
BF16_MAX = tl.constexpr(3.3895313892515355e38)


def readable(x: Tensor) -> Tensor:
    """x with bf16 as bits, int16: whoever loads it unpacks pairs, and the interpreter's conversions of bf16 are wrong."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def portable(x: Tensor) -> Tensor:
    """x, or the bits of bf16 where the interpreter runs: what `rounded` values are written to."""
    return readable(x) if INTERPRETED else x


def wide(x: Tensor) -> bool:
    """Whether a thread may load neighbours of a row of x [rows, cols] as 32-bit words."""
    per_word = 4 // x.element_size()
    return x.stride(1) == 1 and all(n % per_word == 0 for n in (x.shape[1], x.stride(0), x.storage_offset()))


def by_registers(device: torch.device) -> bool:
    """Whether a product's second operand that is loaded as it is must go through `apart`: with tcgen05, where Triton does not
    fence. Nor does that with wgmma, where nobody has seen it fail and the detour costs more."""
    return bool(UNFENCED) and _device.matrix_instruction(device) == "tcgen05"


@jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@jit
def real(x):
    return x.to(tl.float32, bitcast=True)


@jit
def apart(x):
    """x, fp32, 16 or 8 bits, with a move that older Triton looks no further through: a tile then goes to tensor cores through
    registers, and with it comes the fence. ptxas takes the move out again."""
    if not UNFENCED:
        return x
    elif x.dtype == tl.float32:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], x.dtype, True, 32 // x.dtype.primitive_bitwidth
        )


@jit
def total(x):
    """The sum of x [rows, cols], rows first: a number, or in Triton 3.6, which finds no layout for a line's sum, [1]."""
    if MOVES:
        return tl.sum(tl.sum(x, 1, keep_dims=True), 0)
    else:
        return tl.sum(tl.sum(x, 1), 0)


@jit
def largest(x):
    """The largest of x [rows, cols], as `total` gives the sum."""
    if MOVES:
        return tl.max(tl.max(x, 1, keep_dims=True), 0)
    else:
        return tl.max(tl.max(x, 1), 0)


@jit
def one(ptr):
    """Where one value goes, for what `total` and `largest` give."""
    if MOVES:
        return ptr + tl.zeros([1], tl.int32)
    else:
        return ptr


@jit
def as_fp32(x):
    """bf16 (loaded as int16: the interpreter's own conversion loses subnormals), fp16 or fp32 to fp32."""
    if x.dtype == tl.int16:
        return real(x.to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@jit
def bf16_pair(a, b):
    """Two fp32 to the nearest bf16, ties to even, as one word, a's in the lower half; beyond the largest an infinity."""
    if WRITTEN_OUT:
        return ((nearest_bf16(a) >> 16) & 0xFFFF) | nearest_bf16(b)
    else:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], tl.int32, True, 1)


@jit
def nearest_bf16(x):
    """fp32 to the nearest bf16, ties to even, as the fp32 bits; NaN stays NaN."""
    b = bits(x)
    return tl.where(x == x, (b + 0x7FFF + ((b >> 16) & 1)) & -65536, 0x7FC00000)


@jit
def rounded(x, out_ptr):
    """fp32 in the type that out_ptr, a `portable` tensor, takes."""
    if out_ptr.dtype.element_ty == tl.int16:
        return (nearest_bf16(x) >> 16).to(tl.int16)
    else:
        return x.to(out_ptr.dtype.element_ty)


@jit
def on_grid(m, LOWEST: tl.constexpr, MANTISSA: tl.constexpr):
    """A magnitude rounded to nearest even on the grid of a float format; its code stands in the low bits of the result.

    LOWEST: fp32's exponent field for the lowest binade of normal numbers, below which the step stays. MANTISSA: bits.
    """
    return bits(m + real(anchor(m, LOWEST, MANTISSA, ((23 - MANTISSA) << 23) - (LOWEST << MANTISSA))))


@jit
def anchor(m, LOWEST: tl.constexpr, MANTISSA: tl.constexpr, base):
    """What to add to m so that the sum's unit in the last place is the format's step at m, and its low bits m's code.

    Its own low bits count the steps of the binades below m's: an even number, which leaves ties as they are.
    """
    return (bits(tl.maximum(m, 2.0 ** (LOWEST - 127))) >> 23) * ((1 << 23) + (1 << MANTISSA)) + base


@jit
def with_low_byte(word, noise, BYTE: tl.constexpr):
    """A constant word, whose lowest byte is zero, with a byte of the noise there."""
    if WRITTEN_OUT:
        return word | ((noise >> (8 * BYTE)) & 255).to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,n,n", [noise, word, 0x7650 + BYTE], tl.int32, True, 1
        )


@jit
def add_down(m, base):
    """m + base of magnitudes, m the smaller, rounded toward zero, as bits."""
    if WRITTEN_OUT:
        nearest = bits(m + real(base))
        return nearest - (real(nearest) - real(base) > m).to(tl.int32)
    else:
        return bits(tl.inline_asm_elementwise("add.rz.f32 $0, $1, $2;", "=f,f,f", [m, real(base)], tl.float32, True, 1))


@jit
def gather_bytes(a, b, c, d, BYTE: tl.constexpr):
    """One byte of each of four words as one word, a's lowest."""
    if WRITTEN_OUT:
        SHIFT: tl.constexpr = 8 * BYTE
        low = ((a >> SHIFT) & 255) | ((b >> SHIFT) & 255) << 8
        return low | ((c >> SHIFT) & 255) << 16 | (d >> SHIFT) << 24
    else:
        pick: tl.constexpr = 0x0040 + 0x11 * BYTE
        return tl.inline_asm_elementwise(
            "{ .reg .b32 low, high; prmt.b32 low, $1, $2, $5; prmt.b32 high, $3, $4, $5; prmt.b32 $0, low, high, 0x5410; }",
            "=r,r,r,r,r,n",
            [a, b, c, d, pick],
            tl.int32,
            True,
            1,
        )


@jit
def e2m1_word(q, START: tl.constexpr):
    """Eight fp32 to the E2M1 codes of a word by the conversion of devices with FP4 tensor cores: nearest even, at most 6."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b8 c<4>;
        cvt.rn.satfinite.e2m1x2.f32 c0, $2, $1;
        cvt.rn.satfinite.e2m1x2.f32 c1, $4, $3;
        cvt.rn.satfinite.e2m1x2.f32 c2, $6, $5;
        cvt.rn.satfinite.e2m1x2.f32 c3, $8, $7;
        mov.b32 $0, {c0, c1, c2, c3};
        }""",
        "=r,f,f,f,f,f,f,f,f",
        [q[START], q[START + 1], q[START + 2], q[START + 3], q[START + 4], q[START + 5], q[START + 6], q[START + 7]],
        tl.int32,
        True,
        1,
    )


@jit
def e4m3_magnitude(m):
    """E4M3 code of a magnitude that is no NaN, saturating at 448."""
    return on_grid(tl.minimum(m, 448.0), 121, 3) & 0x7F


@jit
def e4m3_value(code):
    """Value of an E4M3 code (int32, 0 to 255); 127 and 255 are NaN. Exact: fp32 reads the code as 2^-120 of its value."""
    m = code & 0x7F
    value = real((m << 20) | ((code & 0x80) << 24)) * 1.329227995784916e36
    return tl.where(m == 0x7F, float("nan"), value)


@jit
def e2m1_bits(word, PLACE: tl.constexpr):
    """The E2M1 code at place PLACE (0 to 7) of a word as fp32, which reads it as 2^-126 of its value."""
    return real(((word << (28 - 4 * PLACE)) >> 6) & -0x7E400000)


@jit
def e2m1_value(code):
    """Value of an E2M1 code in the low 4 bits of an int32, exact."""
    return e2m1_bits(code, 0) * 8.507059173023462e37


@jit
def e8m0_value(scale):
    """2^(scale - 127) of a stored exponent (int32, 0 to 255); 0 is the subnormal 2^-127, 255 NaN."""
    value = real(tl.where(scale == 0, 0x00400000, scale << 23))
    return tl.where(scale == 255, float("nan"), value)


@jit
def philox(block, seed, offset):
    """Philox4x32-10: four words of noise for each block index (int64); key = seed, counter = (block, offset)."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@jit
def butterflies(v, STRIDE: tl.constexpr):
    turned = ()
    for i in tl.static_range(16):
        if (i // STRIDE) % 2 == 0:
            turned += (v[i] + v[i + STRIDE],)
        else:
            turned += (v[i - STRIDE] - v[i],)
    return turned


@jit
def hadamard(v, SIGNS: tl.constexpr):
    """v @ (S H16 / 4), not yet rounded to bf16. 1/16 first and 4 last, both exact, so that no sum overflows; the order of
    the butterflies is part of the contract."""
    turned = ()
    for i in tl.static_range(16):
        turned += (v[i] * (0.0625 - 0.125 * ((SIGNS >> i) & 1)),)
    turned = butterflies(butterflies(butterflies(butterflies(turned, 1), 2), 4), 8)
    result = ()
    for i in tl.static_range(16):
        result += (turned[i] * 4.0,)
    return result


@jit
def quarters(x):
    """[A, B, 4] to four [A, B], in order."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@jit
def quarters_joined(w):
    """Four [A, B] to [A, B, 4], in order."""
    return tl.reshape(tl.join(tl.join(w[0], w[2]), tl.join(w[1], w[3])), [w[0].shape[0], w[0].shape[1], 4])


@jit
def eighths_joined(w):
    """Eight [A, B] to [A, B, 8], in order."""
    even = tl.join(tl.join(w[0], w[4]), tl.join(w[2], w[6]))
    odd = tl.join(tl.join(w[1], w[5]), tl.join(w[3], w[7]))
    return tl.reshape(tl.join(even, odd), [w[0].shape[0], w[0].shape[1], 8])


@jit
def values_of(word, DTYPE: tl.constexpr):
    """The values of a 32-bit word as fp32: one fp32, or two bf16 (called int16) or fp16, the lower first."""
    if DTYPE == tl.float32:
        return (real(word),)
    elif DTYPE == tl.int16:
        return real(word << 16), real(word & -65536)
    else:
        low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@jit
def load_picked_runs(x_ptr, index_ptr, rows, line, block, lines, length, line_stride, step):
    """As load_runs, where a line has those of its `rows` values that the index names, `length` of them."""
    at = x_ptr + line[:, None].to(tl.int64) * line_stride
    v = ()
    for j in tl.static_range(16):
        row = picked(index_ptr, block * 16 + j, length, rows)[None, :]
        v += (as_fp32(tl.load(at + row * step, (line < lines)[:, None] & (row < rows), 0)),)
    return v


@jit
def load_runs(x_ptr, line, block, lines, length, line_stride, step, WIDE: tl.constexpr):
    """Values 16 block .. 16 block + 15 of each line: sixteen fp32 tensors [lines, blocks], zero beyond the matrix.

    line, block: index vectors. step: elements from a value of a line to the next, fifteen of them below 2^31. WIDE: step is 1,
    and a thread loads 16 bytes at once; else the lines should be neighbours in memory, and so are the threads.
    """
    at = x_ptr + line[:, None].to(tl.int64) * line_stride + block[None, :].to(tl.int64) * 16 * step
    v = ()
    if WIDE:
        WIDTH: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 16
        at = at.to(tl.pointer_type(tl.int32))
        words = (length if WIDTH == 2 else length // 2) - block[None, :] * (8 * WIDTH)
        j = tl.arange(0, 4)[None, None, :]
        for start in tl.static_range(0, 8 * WIDTH, 4):
            inside = (line < lines)[:, None, None] & (start + j < words[:, :, None])
            four = quarters(tl.load(at[:, :, None] + (start + j), inside, 0))
            for i in tl.static_range(4):
                v += values_of(four[i], x_ptr.dtype.element_ty)
    else:
        within = length - block[None, :] * 16
        for j in tl.static_range(16):
            v += (as_fp32(tl.load(at + j * step, (line < lines)[:, None] & (j < within), 0)),)
    return v

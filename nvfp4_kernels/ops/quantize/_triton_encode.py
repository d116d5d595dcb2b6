"""From runs of 16 values to codes and scales: the tensor's scale, the blocks' scales, the packed words.

A run is a tuple of 16 tensors [lines, runs] (_triton_numerics.py). Scales in the order of csrc/numerics/block_scale.h;
SPEC is the form's QuantSpec, a constant of the compiled kernel.
"""

from nvfp4_kernels.ops._triton import jit, tl
from nvfp4_kernels.ops._triton_numerics import (
    BF16_MAX,
    add_down,
    anchor,
    bits,
    e2m1_value,
    e2m1_word,
    e4m3_magnitude,
    e4m3_value,
    gather_bytes,
    nearest_bf16,
    on_grid,
    philox,
    real,
    with_low_byte,
)

FLT_MAX = tl.constexpr(3.4028234663852886e38)
INFINITY = tl.constexpr(0x7F800000)
LOWEST = tl.constexpr(127)  # E2M1's lowest binade of normal numbers is that of 1


@jit
def largest(bits_ptr, count, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    return tl.max(tl.load(bits_ptr + i, i < count, 0), 0)


@jit
def tensor_scale(amax_ptr, count, COUNT: tl.constexpr, TURNED: tl.constexpr, SPEC: tl.constexpr):
    """(amax, encode scale, its reciprocal, whether all values are finite) from what amax_kernel left."""
    return scale_of(largest(amax_ptr, count, COUNT), largest(amax_ptr + TURNED * count, count, COUNT), SPEC)


@jit
def scale_of(raw, turned, SPEC: tl.constexpr):
    """The same from the bits of the largest magnitudes of the values and of their transform."""
    amax = real(raw)
    if SPEC.hadamard is not None:
        amax = real(
            nearest_bf16(tl.minimum(real(turned), BF16_MAX))
        )  # rounding is monotone: the amax of rounded values
    finite = raw < INFINITY
    amax = tl.where(finite, amax, 0.0)
    if SPEC.four_over_six is None:
        most = 2688.0
    else:
        most = 1536.0
    g_enc = tl.minimum(tl.div_rn(tl.full(amax.shape, most, tl.float32), tl.where(amax == 0.0, 1.0, amax)), FLT_MAX)
    g_enc = tl.where(amax == 0.0, 1.0, g_enc)
    return amax, g_enc, tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), g_enc), finite


@jit
def encode_scale(scale, g_dec):
    """What a block's values are multiplied by: 1 / (scale * g_dec), a zero scale giving FLT_MAX."""
    decode = e4m3_value(scale) * g_dec
    return tl.minimum(tl.div_rn(tl.full(decode.shape, 1.0, tl.float32), decode), FLT_MAX)


@jit
def over_tiles(x):
    """The largest of each 16 lines, given back to each of them."""
    tiles = tl.reshape(x, [x.shape[0] // 16, 16, x.shape[1]])
    most = tl.max(tiles, 1)[:, None, :]
    return tl.reshape(tl.broadcast_to(most, tiles.shape), x.shape)


@jit
def sum_over_tiles(x):
    """The sum of each 16 lines, first line first, given back to each of them."""
    tiles = tl.permute(tl.reshape(x, [x.shape[0] // 16, 16, x.shape[1]]), (0, 2, 1))
    even, odd = tl.split(tl.reshape(tiles, [tiles.shape[0], tiles.shape[1], 8, 2]))
    total = tl.zeros([tiles.shape[0], tiles.shape[1]], tl.float32)
    for i in tl.static_range(8):
        total += tl.sum(tl.where(tl.arange(0, 8)[None, None, :] == i, even, 0.0), 2)
        total += tl.sum(tl.where(tl.arange(0, 8)[None, None, :] == i, odd, 0.0), 2)
    spread = tl.broadcast_to(total[:, None, :], [tiles.shape[0], 16, tiles.shape[1]])
    return tl.reshape(spread, x.shape)


@jit
def magnitudes(v):
    most = tl.abs(v[0])
    for j in tl.static_range(1, 16):
        most = tl.maximum(most, tl.abs(v[j]))
    return most


@jit
def saturated(v):
    result = ()
    for j in tl.static_range(16):
        result += (tl.maximum(tl.minimum(v[j], BF16_MAX), -BF16_MAX),)
    return result


@jit
def error(v, scale, amax, g_dec, SPEC: tl.constexpr):
    """Sum of the errors under a candidate scale, element after element, in the order that block_scale.h states."""
    enc, decode = encode_scale(scale, g_dec), e4m3_value(scale)
    total = tl.zeros(scale.shape, tl.float32)
    for j in tl.static_range(16):
        q = v[j] * enc
        code = on_grid(tl.minimum(tl.abs(q), 6.0), LOWEST, 1) & 7
        value = e2m1_value(code | ((bits(q) >> 28) & 8)) * decode * amax
        difference = tl.div_rn(value, tl.full(value.shape, 1536.0, tl.float32)) - v[j]
        if SPEC.four_over_six == "mae":
            total += tl.abs(difference)
        else:
            total += difference * difference
    if SPEC.block == "16x16":
        total = sum_over_tiles(total)
    return total


@jit
def four_over_six(v, block_amax, amax, g_enc, g_dec, SPEC: tl.constexpr):
    """The scale that maps the block's amax to 4, where its error is strictly smaller than that of mapping it to 6."""
    base = tl.div_rn(block_amax, tl.full(block_amax.shape, 6.0, tl.float32)) * g_enc
    six, four = e4m3_magnitude(base), e4m3_magnitude(base * 1.5)
    return tl.where(error(v, four, amax, g_dec, SPEC) < error(v, six, amax, g_dec, SPEC), four, six)


@jit
def packed(c, v, START: tl.constexpr, BYTE: tl.constexpr):
    """Eight codes as one word: magnitudes from byte BYTE of c, clean of other bits, signs from the values."""
    even, odd = gather_bytes(c[0], c[2], c[4], c[6], BYTE), gather_bytes(c[1], c[3], c[5], c[7], BYTE)
    minus_even = gather_bytes(bits(v[START]), bits(v[START + 2]), bits(v[START + 4]), bits(v[START + 6]), 3)
    minus_odd = gather_bytes(bits(v[START + 1]), bits(v[START + 3]), bits(v[START + 5]), bits(v[START + 7]), 3)
    return even | (odd << 4) | ((minus_even >> 4) & 0x08080808) | (minus_odd & -0x7F7F7F80)


@jit
def both(low, high):
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@jit
def nearest_word(v, enc, limit, START: tl.constexpr, CONVERTS: tl.constexpr):
    """CONVERTS: the device rounds to E2M1 itself; infinities, which stand for what the limit is, become 6 as it is here."""
    c = ()
    for j in tl.static_range(8):
        if CONVERTS:
            c += (v[START + j] * enc,)
        else:
            c += (on_grid(tl.minimum(tl.abs(v[START + j] * enc), limit), LOWEST, 1),)
    return e2m1_word(c, 0) if CONVERTS else packed(c, v, START, 0)


@jit
def stochastic_word(v, enc, limit, noise, more_noise, START: tl.constexpr):
    """The grid with 8 more bits, truncated: floor(256 f) and the code above it; the noise byte rides in the anchor."""
    c = ()
    for j in tl.static_range(8):
        m = tl.minimum(tl.abs(v[START + j] * enc), limit)
        word = noise if j < 4 else more_noise
        c += (add_down(m, anchor(m, LOWEST, 9, with_low_byte((14 << 23) - (LOWEST << 9), word, j % 4))),)
    return packed(c, v, START, 1)


@jit
def encode_nvfp4(
    v, index, amax, g_enc, g_dec, finite, seed, offset, SPEC: tl.constexpr, CONVERTS: tl.constexpr
):  # fmt: skip
    """(16 codes as an int64, scale code) of each run; index: the run's number in the form, for the noise.

    A rotated value may be an infinity where the reference saturates at BF16_MAX: the limit of the scaled magnitude and the
    amax make up for that, once a run and not once a value.
    """
    limit = 6.0
    block_amax = magnitudes(v)
    if SPEC.hadamard is not None:
        block_amax = tl.minimum(block_amax, BF16_MAX)
    if SPEC.block == "16x16":
        block_amax = over_tiles(block_amax)
    if SPEC.four_over_six is None:
        scale = e4m3_magnitude(block_amax * (g_enc * 0.16666667163372040))
    else:
        if SPEC.hadamard is not None:
            v = saturated(v)
        scale = four_over_six(v, block_amax, amax, g_enc, g_dec, SPEC)
    enc = encode_scale(scale, g_dec)
    if SPEC.hadamard is not None:
        limit = tl.minimum(enc * BF16_MAX, 6.0)
    if SPEC.stochastic:
        # the sign of a magnitude is zero: the index so takes the values' layout, where the noise is wanted
        n0, n1, n2, n3 = philox(index | (bits(block_amax) >> 31), seed, offset)
        codes = both(stochastic_word(v, enc, limit, n0, n1, 0), stochastic_word(v, enc, limit, n2, n3, 8))
    else:
        codes = both(nearest_word(v, enc, limit, 0, CONVERTS), nearest_word(v, enc, limit, 8, CONVERTS))
    return tl.where(finite, codes, 0), tl.where(finite, scale, 0)


@jit
def mxfp8_word(v, inverse, finite, START: tl.constexpr):
    c = ()
    for j in tl.static_range(4):
        c += (on_grid(tl.minimum(tl.abs(v[START + j] * inverse), 448.0), 121, 3),)
    minus = gather_bytes(bits(v[START]), bits(v[START + 1]), bits(v[START + 2]), bits(v[START + 3]), 3)
    word = gather_bytes(c[0], c[1], c[2], c[3], 0) | (minus & -0x7F7F7F80)
    return tl.where(finite, word, 0)


@jit
def encode_mxfp8(v):
    """(codes 0 to 7 and 8 to 15 as int64, stored exponent) of each run, a pair of which shares its exponent."""
    most = bits(v[0]) & 0x7FFFFFFF
    for j in tl.static_range(1, 16):
        most = tl.maximum(most, bits(v[j]) & 0x7FFFFFFF)
    pairs = tl.reshape(most, [most.shape[0], most.shape[1] // 2, 2])
    pair_most = tl.max(pairs, 2)
    most = tl.reshape(tl.broadcast_to(pair_most[:, :, None], pairs.shape), most.shape)
    finite, pair_finite = most < INFINITY, pair_most < INFINITY
    inverse = real((254 - tl.where(finite, exponent(most), 0)) << 23)
    low = both(mxfp8_word(v, inverse, finite, 0), mxfp8_word(v, inverse, finite, 4))
    high = both(mxfp8_word(v, inverse, finite, 8), mxfp8_word(v, inverse, finite, 12))
    return low, high, tl.where(pair_finite, exponent(pair_most), 255)


@jit
def exponent(most):
    """Stored exponent of the smallest power of two under which a magnitude (as bits) is at most 448 = 1.75 * 2^8."""
    e = (most >> 23) + ((most & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.maximum(e - 8, 0)

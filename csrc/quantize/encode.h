// From a tile of values to codes and scales of its sixteen blocks, lanes of blocks at a time: amax, scale, code and random
// bytes are all vertical operations, no lane ever talks to another (but for the one amax of a 16x16 tile).
#pragma once
#include "cpu/tile.h"
#include "numerics/block_scale.h"
#include "numerics/mxfp8.h"
#include "numerics/philox.h"
#include "params.h"

namespace nvfp4 {
namespace NVFP4_ISA {

// Where the results of the blocks of one tile go, and which blocks they are.
struct Target {
    u8* codes;
    u8* scales;
    i64 codes_stride, scales_stride;  // bytes from a block to the next block of the tile
    i64 index, index_stride;          // block index of the first, and from one to the next (Philox counter)
    int count;                        // how many of the sixteen lie inside the matrix
};

static inline void block_indices(const Target& to, int lane, U& low, U& high) {
    u32 lows[16], highs[16];
    for (int i = 0; i < F::lanes; ++i) {
        const u64 index = static_cast<u64>(to.index + (lane + i) * to.index_stride);
        lows[i] = static_cast<u32>(index);
        highs[i] = static_cast<u32>(index >> 32);
    }
    low = load(lows);
    high = load(highs);
}

template <bool stochastic>
static inline void encode_codes(const QuantizeForm& form, const TensorScale& s, const Tile& t, const u32* scale,
                                const Target& to) {
    alignas(64) u32 words[32];
    const u64 first = static_cast<u64>(to.index);
    // Block indices as words; when the sixteen of them straddle a multiple of 2^32, through memory.
    const bool straddle = (first & 0xFFFFFFFFu) + 15 * static_cast<u64>(to.index_stride) > 0xFFFFFFFFu;
    for (int l = 0; l < 16; l += F::lanes) {
        const F enc = block_encode<F>(load(scale + l), s);
        Draw<U> draw;
        if (stochastic) {
            U low, high(static_cast<u32>(first >> 32));
            if (straddle) {
                block_indices(to, l, low, high);
            } else {
                U unused;
                low = multiply_wide(lane_numbers() + U(static_cast<u32>(l)), static_cast<u32>(to.index_stride), unused) +
                      U(static_cast<u32>(first));
            }
            draw = philox(low, high, form.offset, form.seed);
        }
        U word[2];
        NVFP4_UNROLL
        for (int half = 0; half < 2; ++half) {
            U packed(0u);
            NVFP4_UNROLL
            for (int j = 0; j < 8; ++j) {
                const F q = load(t.v[8 * half + j] + l) * enc;
                const U code = stochastic ? e2m1_stochastic(q, random_byte(draw, 8 * half + j)) : e2m1_nearest(q);
                packed = packed | (code << (4 * j));
            }
            word[half] = packed;
        }
        store_pairs(words + 2 * l, word[0], word[1]);
    }
    for (int i = 0; i < to.count; ++i) __builtin_memcpy(to.codes + i * to.codes_stride, words + 2 * i, 8);
}

static inline float in_order_sum(const float* x) {
    float total = 0.0f;
    for (int i = 0; i < 16; ++i) total += x[i];
    return total;
}

// Keeps the scale that maps amax to 4 where its error is strictly smaller. A 16x16 tile decides once: each of its rows sums
// its errors in the order of the elements, then the rows are summed in order.
static inline void choose_four_over_six(const QuantizeForm& form, const TensorScale& s, const Tile& t, const float* amax,
                                        u32* scale) {
    alignas(64) float error_six[16], error_four[16];
    alignas(64) u32 six[16], four[16];
    for (int l = 0; l < 16; l += F::lanes) {
        U candidate[2];
        block_scale_candidates(load(amax + l), s, candidate[0], candidate[1]);
        F error[2];
        for (int c = 0; c < 2; ++c) {
            const F decode = e4m3_decode_magnitude<F>(candidate[c]), enc = block_encode<F>(candidate[c], s);
            error[c] = F(0.0f);
            for (int j = 0; j < 16; ++j) {
                const F e = block_error(load(t.v[j] + l), decode, enc, s);
                error[c] = error[c] + (form.four_over_six == FourOverSix::mae ? magnitude(e) : e * e);
            }
        }
        store(six + l, candidate[0]);
        store(four + l, candidate[1]);
        store(error_six + l, error[0]);
        store(error_four + l, error[1]);
    }
    if (form.block == Block::b16x16) {
        const F e4(in_order_sum(error_four)), e6(in_order_sum(error_six));
        for (int l = 0; l < 16; l += F::lanes) {
            store(error_four + l, e4);
            store(error_six + l, e6);
        }
    }
    for (int l = 0; l < 16; l += F::lanes) {
        store(scale + l, select(less(load(error_four + l), load(error_six + l)), load(four + l), load(six + l)));
    }
}

// t holds the values after the transform, if there is one.
static inline void encode_nvfp4(const QuantizeForm& form, const TensorScale& s, const Tile& t, const Target& to) {
    alignas(64) float amax[16];
    alignas(64) u32 scale[16];
    alignas(16) u8 scale_bytes[16];
    for (int l = 0; l < 16; l += F::lanes) store(amax + l, F(0.0f));
    add_block_amax(t, amax);
    if (form.block == Block::b16x16) {
        const F m(largest16(amax));
        for (int l = 0; l < 16; l += F::lanes) store(amax + l, m);
    }
    if (form.four_over_six == FourOverSix::off) {
        for (int l = 0; l < 16; l += F::lanes) store(scale + l, block_scale(load(amax + l), s));
    } else {
        choose_four_over_six(form, s, t, amax, scale);
    }
    if (form.stochastic) {
        encode_codes<true>(form, s, t, scale, to);
    } else {
        encode_codes<false>(form, s, t, scale, to);
    }
    for (int l = 0; l < 16; l += F::lanes) store_bytes(scale_bytes + l, load(scale + l));
    for (int i = 0; i < to.count; ++i) to.scales[i * to.scales_stride] = scale_bytes[i];
}

// Elements 0..15 of the sixteen blocks in t[0], 16..31 in t[1].
static inline void encode_mxfp8(const Tile* t, const Target& to) {
    alignas(64) u32 words[8][16], scale[16];
    for (int l = 0; l < 16; l += F::lanes) {
        F amax(0.0f);
        U bad(0u);
        for (int j = 0; j < 32; ++j) {
            const F m = magnitude(load(t[j >> 4].v[j & 15] + l));
            bad = select(less_int(U(0x7F7FFFFFu), bits(m)), U(1u), bad);
            amax = greatest(amax, m);
        }
        const auto finite = equal(bad, U(0u));
        const U exponent = e8m0_encode(select(finite, amax, F(0.0f)));
        const F inverse = e8m0_inverse<F>(exponent);
        for (int w = 0; w < 8; ++w) {
            U packed(0u);
            for (int b = 0; b < 4; ++b) {
                const int j = 4 * w + b;
                packed = packed | (e4m3_encode(load(t[j >> 4].v[j & 15] + l) * inverse) << (8 * b));
            }
            store(words[w] + l, select(finite, packed, U(0u)));
        }
        store(scale + l, select(finite, exponent, U(e8m0_nan)));
    }
    for (int i = 0; i < to.count; ++i) {
        for (int w = 0; w < 8; ++w) __builtin_memcpy(to.codes + i * to.codes_stride + 4 * w, &words[w][i], 4);
        to.scales[i * to.scales_stride] = static_cast<u8>(scale[i]);
    }
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

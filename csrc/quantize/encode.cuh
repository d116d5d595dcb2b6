// From the two blocks that a thread holds to their codes and scales. Blocks outside the matrix are zeros and take part: the
// lanes of a warp stay together.
#pragma once
#include "numerics/block_scale.h"
#include "numerics/hadamard.h"
#include "numerics/mxfp8.h"
#include "numerics/philox.h"
#include "tiles.cuh"

namespace nvfp4 {

// What a kernel knows of a form when it is compiled.
enum Known { absent = 0, present = 1, tiles16 = 2, stochastic = 4, rotated = 8, anything = 16 };

template <int known>
struct Options {
    const FormLaunch& f;
    static constexpr bool any = (known & anything) != 0;
    __device__ __forceinline__ bool is_present() const { return any ? f.block != 0 : known != absent; }
    __device__ __forceinline__ bool is_tiled() const { return any ? f.block == static_cast<i32>(Block::b16x16) : (known & tiles16) != 0; }
    __device__ __forceinline__ bool is_stochastic() const { return any ? f.stochastic != 0 : (known & stochastic) != 0; }
    __device__ __forceinline__ bool is_rotated() const { return any ? f.hadamard >= 0 : (known & rotated) != 0; }
    __device__ __forceinline__ bool chooses() const { return any && f.four_over_six != 0; }
};

struct Encoded {
    u32 word[2][2];  // codes of each block, the first value in the lowest bits
    u32 scale[2];
};

// Of magnitudes, none of them NaN: one instruction, which `greatest` with its order of operands is not.
static __device__ __forceinline__ F32x1 larger(F32x1 a, F32x1 b) { return F32x1(fmaxf(a.v, b.v)); }

static __device__ __forceinline__ F32x1 eight_lanes_largest(F32x1 x) {
    NVFP4_UNROLL
    for (int d = 1; d < 8; d *= 2) x = larger(x, F32x1(__shfl_xor_sync(all_lanes, x.v, d)));
    return x;
}

// The sum of a 16x16 tile's errors, its lines in order: rows are lane, lane + 8 of the eight lanes, columns 2 lane, 2 lane + 1.
template <bool columns>
static __device__ __forceinline__ F32x1 eight_lanes_sum(const F32x1* error) {
    const int first = lane_index() & 24;
    F32x1 total(0.0f);
    NVFP4_UNROLL
    for (int line = 0; line < 16; ++line) {
        const int half = columns ? line & 1 : line >> 3, from = columns ? line >> 1 : line & 7;
        total = total + F32x1(__shfl_sync(all_lanes, error[half].v, first | from));
    }
    return total;
}

// Which of the two candidates each block takes (numerics/block_scale.h); a 16x16 tile chooses as one.
template <bool columns>
static __device__ __forceinline__ void choose_scales(const FormLaunch& f, bool tiled, const TensorScale& s, const F32x1 (&v)[2][16],
                                                     const F32x1* amax, u32* scale) {
    F32x1 error[2][2];  // [candidate][block]
    u32 candidate[2][2];
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) {
        U32x1 six, four;
        block_scale_candidates(amax[half], s, six, four);
        candidate[0][half] = six.v;
        candidate[1][half] = four.v;
        NVFP4_UNROLL
        for (int c = 0; c < 2; ++c) {
            const F32x1 decode = e4m3_decode_magnitude<F32x1>(candidate[c][half]);
            const F32x1 enc = block_encode<F32x1>(candidate[c][half], s);
            F32x1 sum(0.0f);
            NVFP4_UNROLL
            for (int j = 0; j < 16; ++j) {
                const F32x1 e = block_error(v[half][j], decode, enc, s);
                sum = sum + (f.four_over_six == static_cast<i32>(FourOverSix::mae) ? magnitude(e) : e * e);
            }
            error[c][half] = sum;
        }
    }
    if (tiled) {
        NVFP4_UNROLL
        for (int c = 0; c < 2; ++c) error[c][0] = error[c][1] = eight_lanes_sum<columns>(error[c]);
    }
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) scale[half] = less(error[1][half], error[0][half]) ? candidate[1][half] : candidate[0][half];
}

struct EncodedBytes {
    u32 word[2][4];
    u32 scale[2];
};

// MXFP8. most: of each block of 32 values, of which another thread has half, the largest magnitude, as bits.
static __device__ __forceinline__ EncodedBytes encode_mxfp8(const F32x1 (&v)[2][16], const u32 (&most)[2]) {
    EncodedBytes out;
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) {
        const bool finite = most[half] < 0x7F800000u;
        const U32x1 exponent = e8m0_encode(real(U32x1(finite ? most[half] : 0u)));
        const F32x1 inverse = e8m0_inverse<F32x1>(exponent);
        out.scale[half] = finite ? exponent.v : e8m0_nan;
        NVFP4_UNROLL
        for (int w = 0; w < 4; ++w) {
            u32 word = 0;
            NVFP4_UNROLL
            for (int b = 0; b < 4; ++b) word |= e4m3_encode(v[half][4 * w + b] * inverse).v << (8 * b);
            out.word[half][w] = finite ? word : 0u;
        }
    }
    return out;
}

// index: of each block in the form, row-major (the Philox counter).
template <int known, bool columns>
static __device__ __forceinline__ Encoded encode(Options<known> o, const TensorScale& s, F32x1 (&v)[2][16], const i64* index,
                                                 u64 seed, u64 offset) {
    Encoded out;
    F32x1 amax[2];
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) {
        if (o.is_rotated()) hadamard16(v[half], static_cast<u32>(o.f.hadamard));
        amax[half] = magnitude(v[half][0]);
        NVFP4_UNROLL
        for (int j = 1; j < 16; ++j) amax[half] = larger(amax[half], magnitude(v[half][j]));
    }
    if (o.is_tiled()) amax[0] = amax[1] = eight_lanes_largest(larger(amax[0], amax[1]));
    if (o.chooses()) {
        choose_scales<columns>(o.f, o.is_tiled(), s, v, amax, out.scale);
    } else {
        out.scale[0] = block_scale(amax[0], s).v;
        out.scale[1] = o.is_tiled() ? out.scale[0] : block_scale(amax[1], s).v;
    }
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) {
        const F32x1 enc = block_encode<F32x1>(out.scale[half], s);
        NVFP4_UNROLL
        for (int j = 0; j < 16; ++j) v[half][j] = v[half][j] * enc;
        if (!o.is_stochastic()) {
            out.word[half][0] = e2m1_word(v[half]);
            out.word[half][1] = e2m1_word(v[half] + 8);
            continue;
        }
        const u64 block = static_cast<u64>(index[half]);
        const Draw<U32x1> draw = philox(U32x1(static_cast<u32>(block)), U32x1(static_cast<u32>(block >> 32)), offset, seed);
        const u32 noise[4] = {draw.word[0].v, draw.word[1].v, draw.word[2].v, draw.word[3].v};
        out.word[half][0] = e2m1_stochastic_word(v[half], noise);
        out.word[half][1] = e2m1_stochastic_word(v[half] + 8, noise + 2);
    }
    return out;
}

}  // namespace nvfp4

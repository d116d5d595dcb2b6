// Eight packed weights to the bf16 registers of an mma, exactly, in 1.8 instructions a weight with the scales.
//
// The three magnitude bits of E2M1, put where bf16 keeps the lowest exponent bits and the highest of the mantissa, read as
// 2^-126 of the value (0.5 becomes a subnormal, which the multiply-add keeps). A packed word holds the bits of four pairs so
// that a shift and a mask bring out each pair; only the fourth needs a second of both. No layout of 32 bits does all four
// with one. Under the block scale a value has 6 significant bits: the product is exact, and leaves 2^-19 of the value.
//
// Scales are packed as ue5m3: five exponent bits take in E4M3's subnormals as normal numbers, and zero stays zero. Shifted
// into place they read as 2^-117 of the scale, which two exact products raise to 2^107.
#pragma once
#include "arch/kernel.cuh"

namespace nvfp4 {

constexpr float packed_unit = 524288.0f;  // 2^19

// The pair of scales in bytes 0 and 2 of x, or 1 and 3, as bf16.
template <int pair>
static __device__ __forceinline__ u32 packed_scales(u32 x) {
    const u32 shifted = (pair == 0 ? x << 4 : x >> 4) & 0x0FF00FF0u;
    return scaled_bf16x2<false>(scaled_bf16x2<false>(shifted, 0x7F00u), 0x7000u);  // 2^127, 2^97
}

static __device__ __forceinline__ u32 rotated_left(u32 x, int n) { return x << n | x >> (32 - n); }

// a[0], a[2]: the pairs of the upper row (scale in the lower half of s), a[1], a[3]: those of the row 8 below.
static __device__ __forceinline__ void decode_weights(u32 q, u32 s, u32* a) {
    constexpr u32 mask = 0x81C081C0u;
    a[0] = scaled_bf16x2<false>(q & mask, s);
    a[1] = scaled_bf16x2<true>(q << 6 & mask, s);
    a[2] = scaled_bf16x2<false>(rotated_left(q, 12) & mask, s);
    a[3] = scaled_bf16x2<true>((q << 2 & 0x80C080C0u) | (rotated_left(q, 10) & 0x01000100u), s);
}

}  // namespace nvfp4

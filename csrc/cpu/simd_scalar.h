// Lanes of one: numerics/lane.h is the whole instruction set. For every CPU, and the path the others are tested against.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {
namespace NVFP4_ISA {

using F = F32x1;
using U = U32x1;

static inline F load(const float* p) { return *p; }
static inline void store(float* p, F x) { *p = x.v; }
static inline U load(const u32* p) { return *p; }
static inline void store(u32* p, U x) { *p = x.v; }
static inline F load_bf16(const u16* p) { return real(U(static_cast<u32>(*p) << 16)); }

static inline F load_fp16(const u16* p) {
    const u32 h = *p, e = h >> 10 & 31, m = h & 0x3FF, sign = (h & 0x8000u) << 16;
    if (e == 31) return real(U(sign | 0x7F800000u | m << 13));
    const F value = e ? real(U((e + 112) << 23 | m << 13)) : F(static_cast<float>(m) * 5.9604644775390625e-8f);
    return real(bits(value) | U(sign));
}

// The low byte of each of the words.
static inline void store_bytes(u8* p, U x) { *p = static_cast<u8>(x.v); }
static inline U load_bytes(const u8* p) { return *p; }
// The first `count` (here none) of as many as there are lanes, zero in the others.
template <class T>
static inline U load_some(const T* p, i64 count) { return count ? *p : 0u; }

// Interleaves words into 8-byte groups: p[2 i] = low[i], p[2 i + 1] = high[i].
static inline void store_pairs(u32* p, U low, U high) {
    p[0] = low.v;
    p[1] = high.v;
}

// The sixteen nibbles of eight bytes, low nibble first, in the low bits of 16 / lanes vectors; higher bits are undefined.
static inline void load_nibbles(const u8* p, U* out) {
    for (int i = 0; i < 16; ++i) out[i] = p[i / 2] >> (i % 2 * 4);
}

// table[index % 16]
static inline F lookup16(const float* table, U index) { return table[index.v & 15]; }
static inline F fma(F a, F b, F c) { return a * b + c; }
static inline float sum(F x) { return x.v; }
static inline float largest(F x) { return x.v; }
static inline U lane_numbers() { return 0u; }

static inline u16 bf16_bits(float x) {
    const u32 b = bits(F(x)).v;
    if ((b & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<u16>(b >> 16 | 0x40);
    return static_cast<u16>((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}

static inline u16 fp16_bits(float x) {
    const u32 b = bits(F(x)).v, sign = b >> 16 & 0x8000u, m = b & 0x7FFFFFFFu;
    if (m > 0x7F800000u) return static_cast<u16>(sign | 0x7E00u);
    if (m >= 0x477FF000u) return static_cast<u16>(sign | 0x7C00u);  // 65520 and above round to infinity
    if (m < 0x38800000u) {  // below 2^-14 the unit is 2^-24: adding 0.5 leaves that unit in a float's last place
        return static_cast<u16>(sign | (bits(real(U(m)) + F(0.5f)).v - 0x3F000000u));
    }
    return static_cast<u16>(sign | ((m - 0x38000000u + 0xFFFu + (m >> 13 & 1)) >> 13));
}

static inline void store_bf16(u16* p, F x) { *p = bf16_bits(x.v); }
static inline void store_fp16(u16* p, F x) { *p = fp16_bits(x.v); }

// out[j][i] = in[i][j] for a 16x16 tile, strides in floats. Moves bits: any 32-bit words will do.
static inline void transpose16(const float* in, i64 in_stride, float* out, i64 out_stride) {
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) __builtin_memcpy(out + j * out_stride + i, in + i * in_stride + j, 4);
    }
}

static inline void sums16(const F* x, float* sums) {
    for (int i = 0; i < 16; ++i) sums[i] = sum(x[i]);
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

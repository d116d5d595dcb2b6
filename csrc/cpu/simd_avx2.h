// Lanes of eight: AVX2, FMA and F16C.
#pragma once
#include <immintrin.h>

#include "numerics/lane.h"

namespace nvfp4 {
namespace NVFP4_ISA {

struct U {
    __m256i v;
    U() = default;
    U(__m256i x) : v(x) {}
    U(u32 x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
};

struct F {
    static constexpr int lanes = 8;
    using Word = U;
    __m256 v;
    F() = default;
    F(__m256 x) : v(x) {}
    F(float x) : v(_mm256_set1_ps(x)) {}
};

struct Mask {
    __m256i v;
};

static inline F operator+(F a, F b) { return _mm256_add_ps(a.v, b.v); }
static inline F operator-(F a, F b) { return _mm256_sub_ps(a.v, b.v); }
static inline F operator*(F a, F b) { return _mm256_mul_ps(a.v, b.v); }
static inline F operator/(F a, F b) { return _mm256_div_ps(a.v, b.v); }
static inline U operator+(U a, U b) { return _mm256_add_epi32(a.v, b.v); }
static inline U operator-(U a, U b) { return _mm256_sub_epi32(a.v, b.v); }
static inline U operator&(U a, U b) { return _mm256_and_si256(a.v, b.v); }
static inline U operator|(U a, U b) { return _mm256_or_si256(a.v, b.v); }
static inline U operator^(U a, U b) { return _mm256_xor_si256(a.v, b.v); }
static inline U operator<<(U a, int n) { return _mm256_slli_epi32(a.v, n); }
static inline U operator>>(U a, int n) { return _mm256_srli_epi32(a.v, n); }
static inline U bits(F a) { return _mm256_castps_si256(a.v); }
static inline F real(U a) { return _mm256_castsi256_ps(a.v); }
static inline U round_int(F a) { return _mm256_cvtps_epi32(a.v); }
static inline U trunc_int(F a) { return _mm256_cvttps_epi32(a.v); }
static inline F to_float(U a) { return _mm256_cvtepi32_ps(a.v); }
static inline F least(F a, F b) { return _mm256_min_ps(a.v, b.v); }
static inline F greatest(F a, F b) { return _mm256_max_ps(a.v, b.v); }
static inline Mask less(F a, F b) { return {_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))}; }
static inline Mask less_int(U a, U b) { return {_mm256_cmpgt_epi32(b.v, a.v)}; }
static inline Mask equal(U a, U b) { return {_mm256_cmpeq_epi32(a.v, b.v)}; }
static inline U select(Mask m, U a, U b) { return _mm256_blendv_epi8(b.v, a.v, m.v); }
static inline F select(Mask m, F a, F b) { return real(select(m, bits(a), bits(b))); }

static inline U multiply_wide(U a, u32 m, U& high) {
    const __m256i multiplier = _mm256_set1_epi32(static_cast<int>(m));
    const __m256i even = _mm256_mul_epu32(a.v, multiplier);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), multiplier);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

static inline F load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, F x) { _mm256_storeu_ps(p, x.v); }
static inline U load(const u32* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline void store(u32* p, U x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
// The first `count` words, zero in the other lanes; bytes likewise, as load_bytes.
static inline U load_some(const u32* p, i64 count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), mask);
}

static inline __m128i load_words16(const u16* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
static inline F load_bf16(const u16* p) { return real(U(_mm256_cvtepu16_epi32(load_words16(p))) << 16); }
static inline F load_fp16(const u16* p) { return _mm256_cvtph_ps(load_words16(p)); }

static inline U load_bytes(const u8* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
static inline U load_some(const u8* p, i64 count) {
    u64 eight = 0;
    for (i64 i = 0; i < count; ++i) eight |= static_cast<u64>(p[i]) << 8 * i;
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(eight)));
}
static inline void store_bytes(u8* p, U x) {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

static inline void store_pairs(u32* p, U low, U high) {
    const __m256i a = _mm256_unpacklo_epi32(low.v, high.v), b = _mm256_unpackhi_epi32(low.v, high.v);
    store(p, U(_mm256_permute2x128_si256(a, b, 0x20)));
    store(p + 8, U(_mm256_permute2x128_si256(a, b, 0x31)));
}

static inline void load_nibbles(const u8* p, U* out) {
    for (int i = 0; i < 2; ++i) {
        i32 four;
        __builtin_memcpy(&four, p + 4 * i, 4);
        const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));  // one byte in two words: the second gets byte >> 4
        out[i] = _mm256_or_si256(bytes, _mm256_slli_epi64(bytes, 28));
    }
}

static inline F lookup16(const float* table, U index) {
    const __m256 a = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index.v);
    const __m256 b = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index.v);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28)));
}

static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
static inline float sum(F x) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

static inline float largest(F x) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
static inline U lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

static inline void store_bf16(u16* p, F x) {
    const U b = bits(x);
    const U rounded = (b + U(0x7FFFu) + ((b >> 16) & U(1u))) >> 16;
    const Mask nan{_mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))};
    const U y = select(nan, (b >> 16) | U(0x40u), rounded);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(y.v, y.v), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
static inline void store_fp16(u16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

static inline void transpose8(const float* in, i64 in_stride, float* out, i64 out_stride) {
    __m256 r[8], t[8];
    NVFP4_UNROLL
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * in_stride);
    NVFP4_UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    NVFP4_UNROLL
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    NVFP4_UNROLL
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

static inline void transpose16(const float* in, i64 in_stride, float* out, i64 out_stride) {
    for (int i = 0; i < 16; i += 8) {
        for (int j = 0; j < 16; j += 8) transpose8(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    }
}

static inline void sums16(const F* x, float* sums) {
    for (int i = 0; i < 16; ++i) sums[i] = sum(x[i]);
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

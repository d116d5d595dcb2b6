// Lanes of sixteen: AVX-512 F, BW, DQ and VL.
#pragma once
#include <immintrin.h>

#include "numerics/lane.h"

namespace nvfp4 {
namespace NVFP4_ISA {

struct U {
    __m512i v;
    U() = default;
    U(__m512i x) : v(x) {}
    U(u32 x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
};

struct F {
    static constexpr int lanes = 16;
    using Word = U;
    __m512 v;
    F() = default;
    F(__m512 x) : v(x) {}
    F(float x) : v(_mm512_set1_ps(x)) {}
};

static inline F operator+(F a, F b) { return _mm512_add_ps(a.v, b.v); }
static inline F operator-(F a, F b) { return _mm512_sub_ps(a.v, b.v); }
static inline F operator*(F a, F b) { return _mm512_mul_ps(a.v, b.v); }
static inline F operator/(F a, F b) { return _mm512_div_ps(a.v, b.v); }
static inline U operator+(U a, U b) { return _mm512_add_epi32(a.v, b.v); }
static inline U operator-(U a, U b) { return _mm512_sub_epi32(a.v, b.v); }
static inline U operator&(U a, U b) { return _mm512_and_si512(a.v, b.v); }
static inline U operator|(U a, U b) { return _mm512_or_si512(a.v, b.v); }
static inline U operator^(U a, U b) { return _mm512_xor_si512(a.v, b.v); }
static inline U operator<<(U a, int n) { return _mm512_slli_epi32(a.v, static_cast<unsigned>(n)); }
static inline U operator>>(U a, int n) { return _mm512_srli_epi32(a.v, static_cast<unsigned>(n)); }
static inline U bits(F a) { return _mm512_castps_si512(a.v); }
static inline F real(U a) { return _mm512_castsi512_ps(a.v); }
static inline U round_int(F a) { return _mm512_cvtps_epi32(a.v); }
static inline U trunc_int(F a) { return _mm512_cvttps_epi32(a.v); }
static inline F to_float(U a) { return _mm512_cvtepi32_ps(a.v); }
static inline F least(F a, F b) { return _mm512_min_ps(a.v, b.v); }
static inline F greatest(F a, F b) { return _mm512_max_ps(a.v, b.v); }
static inline __mmask16 less(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
static inline __mmask16 less_int(U a, U b) { return _mm512_cmplt_epi32_mask(a.v, b.v); }
static inline __mmask16 equal(U a, U b) { return _mm512_cmpeq_epi32_mask(a.v, b.v); }
static inline U select(__mmask16 m, U a, U b) { return _mm512_mask_blend_epi32(m, b.v, a.v); }
static inline F select(__mmask16 m, F a, F b) { return _mm512_mask_blend_ps(m, b.v, a.v); }

static inline U multiply_wide(U a, u32 m, U& high) {
    const __m512i multiplier = _mm512_set1_epi32(static_cast<int>(m));
    const __m512i even = _mm512_mul_epu32(a.v, multiplier);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), multiplier);
    high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
static inline U load(const u32* p) { return _mm512_loadu_si512(p); }
static inline void store(u32* p, U x) { _mm512_storeu_si512(p, x.v); }
// The first `count` words, zero in the other lanes; bytes likewise, as load_bytes.
static inline U load_some(const u32* p, i64 count) { return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), p); }

static inline __m256i load_words16(const u16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline F load_bf16(const u16* p) { return real(U(_mm512_cvtepu16_epi32(load_words16(p))) << 16); }
static inline F load_fp16(const u16* p) { return _mm512_cvtph_ps(load_words16(p)); }

static inline U load_bytes(const u8* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline U load_some(const u8* p, i64 count) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), p));
}
static inline void store_bytes(u8* p, U x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v)); }

static inline void store_pairs(u32* p, U low, U high) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    store(p, U(_mm512_permutex2var_epi32(low.v, first, high.v)));
    store(p + 16, U(_mm512_permutex2var_epi32(low.v, second, high.v)));
}

static inline void load_nibbles(const u8* p, U* out) {
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    *out = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));  // a byte has two words: the second gets byte >> 4
}

static inline F lookup16(const float* table, U index) { return _mm512_permutexvar_ps(index.v, _mm512_loadu_ps(table)); }
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
static inline F times_power(F p, F n) { return _mm512_scalef_ps(p.v, n.v); }
static inline float sum(F x) { return _mm512_reduce_add_ps(x.v); }
static inline float largest(F x) { return _mm512_reduce_max_ps(x.v); }
static inline U lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

static inline void store_bf16(u16* p, F x) {
    const U b = bits(x);
    const U rounded = (b + U(0x7FFFu) + ((b >> 16) & U(1u))) >> 16;
    const U y = select(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), (b >> 16) | U(0x40u), rounded);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(y.v));
}
static inline void store_fp16(u16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

// Four stages; stage s exchanges between rows 2^s apart: 64 shuffles for 256 values.
static inline void transpose16(__m512* r) {
    __m512 t[16];
    NVFP4_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    NVFP4_UNROLL
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    NVFP4_UNROLL
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
    }
    NVFP4_UNROLL
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
    }
}

static inline void transpose16(const float* in, i64 in_stride, float* out, i64 out_stride) {
    __m512 r[16];
    NVFP4_UNROLL
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * in_stride);
    transpose16(r);
    NVFP4_UNROLL
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + i * out_stride, r[i]);
}

// sums[i] = the sum of x[i]'s lanes. Each stage adds halves of two vectors side by side in one.
static inline void sums16(const F* x, float* sums) {
    __m512 r[8];
    NVFP4_UNROLL
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v), _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v));
    }
    NVFP4_UNROLL
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_add_ps(_mm512_shuffle_ps(r[2 * i], r[2 * i + 1], 0x44), _mm512_shuffle_ps(r[2 * i], r[2 * i + 1], 0xEE));
    }
    NVFP4_UNROLL
    for (int n = 2; n > 0; --n) {
        NVFP4_UNROLL
        for (int i = 0; i < n; ++i) {
            r[i] = _mm512_add_ps(_mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xDD));
        }
    }
    _mm512_storeu_ps(sums, r[0]);
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// What a matrix product takes at a time along its sum: one fp32 value, or two bf16 values for the bf16 dot product.
#pragma once
#include "simd.h"

namespace nvfp4 {
namespace NVFP4_ISA {

constexpr int vectors16 = 16 / F::lanes;  // vectors that hold sixteen values

static inline F broadcast(float x) { return F(x); }
static inline F dot(F sum, F a, F b) { return fma(a, b, sum); }

struct Single32 {  // fp32 steps
    using Step = float;
    static constexpr int values = 1;
    static void put16(const F* from, float* to) {
        for (int i = 0; i < vectors16; ++i) store(to + i * F::lanes, from[i]);
    }
    static F first(F step) { return step; }
    template <class T>
    static void store_rounded(T* to, F x) { store(to, x); }
};

#if defined(NVFP4_ISA_AVX512BF16)
static inline U broadcast(u32 x) { return U(x); }
// sum + a0 b0 + a1 b1 in each lane; the instruction takes and gives zero for subnormals.
static inline F dot(F sum, U a, U b) {
    return _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
}

struct Pair16 {  // bf16 pairs
    using Step = u32;
    static constexpr int values = 2;
    static void put16(const F* from, u32* to) {  // the values are exact in bf16
        const __m256bh rounded = _mm512_cvtneps_pbh(from->v);
        __builtin_memcpy(to, &rounded, 32);
    }
    // One instruction instead of ten; a subnormal result becomes zero.
    static void store_rounded(Brain* to, F x) {
        const __m256bh rounded = _mm512_cvtneps_pbh(x.v);
        __builtin_memcpy(to, &rounded, 32);
    }
    template <class T>
    static void store_rounded(T* to, F x) { store(to, x); }
    // The first value of each step, beside a zero.
    static U first(U steps) { return steps & U(0x0000FFFFu); }
    // Thirty-two values rounded, in order.
    static U narrow(F first, F second) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v)); }
    // Sixteen steps of a value of `even` (the low half) and one of `odd`, rounded.
    static U pair(F even, F odd) {
        const __m512i order = _mm512_add_epi32(_mm512_mullo_epi32(lane_numbers().v, _mm512_set1_epi32(0x00010001)),
                                               _mm512_set1_epi32(0x00100000));
        return _mm512_permutexvar_epi16(order, narrow(even, odd).v);
    }
};
using Steps = Pair16;  // what is not in bf16 goes to the kernels for AVX-512
#else
using Steps = Single32;
#endif

}  // namespace NVFP4_ISA
}  // namespace nvfp4

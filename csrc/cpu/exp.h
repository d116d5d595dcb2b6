// exp, log1p and what Mamba's ops make of them, in fp32. Largest errors that tests/native/exp_tests.cpp finds, in units of the
// last place of the exact value, with FMA or without: exp 0.97, softplus 2.7, sigmoid and silu 2.3.
// Coefficients: weighted minimax fits (Lawson's iteration) in fp64, rounded to fp32; their own relative error is below 5e-9.
#pragma once
#include "simd.h"

namespace nvfp4 {
namespace NVFP4_ISA {

// p * 2^n for an integer n of -150 to 128 and p in [0.7, 1.42]; two factors, so that only the last product may be subnormal
// or overflow. AVX-512 has an instruction for it: the overload in simd_avx512.h.
template <class Lanes>
static inline Lanes times_power(Lanes p, Lanes n) {
    const U exponent = bits(n + F(12582912.0f)) - U(0x4B400000u - 254u);  // n + 254: 1.5 * 2^23 has a unit of one
    const U half = exponent >> 1;
    return p * real(half << 23) * real((exponent - half) << 23);
}

// e^x of n vectors, in place: 0 below -104, Inf above 88.73, NaN for NaN. The halves of ln 2: m * 0.693359375 is exact. One
// vector is a chain of some twenty dependent operations, and the schedulers see few chains ahead: two or four in step overlap.
template <int n>
NVFP4_INLINE void exp(F* x) {
    F m[n], q[n];
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) x[i] = least(F(89.0f), greatest(F(-104.0f), x[i]));  // a NaN, the second operand, comes back
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) m[i] = fma(x[i], F(1.44269504f), F(12582912.0f)) - F(12582912.0f);
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) x[i] = fma(m[i], F(2.12194440e-4f), fma(m[i], F(-0.693359375f), x[i]));
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) q[i] = fma(F(1.3814174e-3f), x[i], F(8.3689215e-3f));
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) q[i] = fma(q[i], x[i], F(4.1668408e-2f));
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) q[i] = fma(q[i], x[i], F(0.1666652f));
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) q[i] = fma(q[i], x[i], F(0.49999994f));
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) x[i] = times_power(fma(q[i], x[i] * x[i], x[i]) + F(1.0f), m[i]);
}
static inline F exp(F x) {
    exp<1>(&x);
    return x;
}

// log(1 + t) for 0 <= t <= 1, the relative error small however small t: 2 atanh(s), s = t / (2 + t).
static inline F log1p_unit(F t) {
    const F s = t / (F(2.0f) + t), w = s * s;
    F h = fma(F(0.28031278f), w, F(0.27997863f));
    h = fma(h, w, F(0.4002177f));
    h = fma(h, w, F(0.6666641f));
    return fma(h * w, s, s + s);
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|): never overflows, and e^x itself for very negative x.
static inline F softplus(F x) { return greatest(F(0.0f), x) + log1p_unit(exp(F(0.0f) - magnitude(x))); }

// The division costs nothing beside the polynomial; rcp14 with a Newton step (AVX-512) was slower by a quarter. Below -88.73 both
// are 0: less than 3e-37 is lost.
template <int n>
NVFP4_INLINE void sigmoid(F* x) {
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) x[i] = F(0.0f) - x[i];
    exp<n>(x);
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) x[i] = F(1.0f) / (F(1.0f) + x[i]);
}
template <int n>
NVFP4_INLINE void silu(F* x) {
    F e[n];
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) e[i] = F(0.0f) - x[i];
    exp<n>(e);
    NVFP4_UNROLL
    for (int i = 0; i < n; ++i) x[i] = x[i] / (F(1.0f) + e[i]);
}
static inline F sigmoid(F x) {
    sigmoid<1>(&x);
    return x;
}
static inline F silu(F x) {
    silu<1>(&x);
    return x;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

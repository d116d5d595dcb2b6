// The lanes of the instruction set this translation unit is compiled for. NVFP4_ISA comes from CMakeLists.txt.
#pragma once

#if defined(NVFP4_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(NVFP4_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(NVFP4_ISA_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

// For what works on arrays of vectors: those live in registers only where no call is left.
#define NVFP4_INLINE static inline __attribute__((always_inline))
#define NVFP4_INLINE_MEMBER inline __attribute__((always_inline))

namespace nvfp4 {
namespace NVFP4_ISA {

// dtypes of high-precision tensors, as op.py numbers them
enum Dtype { fp32 = 0, fp16 = 1, bf16 = 2 };

// Elements of the three types, by their bit patterns.
struct Single { u32 bits; };
struct Half { u16 bits; };
struct Brain { u16 bits; };

static inline F load(const Single* p) { return real(load(&p->bits)); }
static inline F load(const Half* p) { return load_fp16(&p->bits); }
static inline F load(const Brain* p) { return load_bf16(&p->bits); }
static inline void store(Single* p, F x) { store(&p->bits, bits(x)); }
static inline void store(Half* p, F x) { store_fp16(&p->bits, x); }
static inline void store(Brain* p, F x) { store_bf16(&p->bits, x); }

// Sixteen values of a type to fp32, from contiguous memory, and back.
template <class T>
static inline void widen16(const T* from, float* to) {
    for (int i = 0; i < 16; i += F::lanes) store(to + i, load(from + i));
}
template <class T>
static inline void narrow16(const float* from, T* to) {
    for (int i = 0; i < 16; i += F::lanes) store(to + i, load(from + i));
}

// Up to sixteen values `stride` apart; the rest of `to` is zero.
template <class T>
static inline void widen_some(const T* from, i64 stride, int count, float* to) {
    T run[16] = {};
    for (int i = 0; i < count; ++i) run[i] = from[i * stride];
    widen16(run, to);
}

// The first `count` (up to sixteen) values of 16 / lanes vectors.
template <class T>
static inline void store_some(const F* from, T* to, int count) {
    if (count >= 16) {
        for (int i = 0; i < 16 / F::lanes; ++i) store(to + i * F::lanes, from[i]);
        return;
    }
    T run[16];
    for (int i = 0; i < 16 / F::lanes; ++i) store(run + i * F::lanes, from[i]);
    for (int i = 0; i < count; ++i) to[i] = run[i];
}

// Calls f with a null pointer of the element type that a dtype number names.
template <class Function>
static inline auto with_dtype(int dtype, Function f) {
    switch (dtype) {
        case fp16: return f(static_cast<Half*>(nullptr));
        case bf16: return f(static_cast<Brain*>(nullptr));
        default: return f(static_cast<Single*>(nullptr));
    }
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

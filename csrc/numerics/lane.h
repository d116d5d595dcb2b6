// What the format's definitions are written in: a "lane" type of floats F with its words F::Word, one value here, 4, 8 or
// 16 in cpu/simd_neon.h, simd_avx2.h and simd_avx512.h. The same templates (e2m1.h, e4m3.h, ...) so serve every CPU path and CUDA.
// Freestanding (no standard header), because NVRTC compiles these files too.
#pragma once

#if defined(__CUDACC__)
#define NVFP4_HD static __host__ __device__ __forceinline__
#define NVFP4_HD_MEMBER __host__ __device__ __forceinline__
#else
// static: each translation unit keeps its own copy, compiled with its own instruction set; a shared inline function could
// be the AVX-512 one in a process without AVX-512.
#define NVFP4_HD static inline
#define NVFP4_HD_MEMBER inline
#endif

// Before a loop of constant count over an array of lanes, which otherwise would live in memory.
#if defined(__CUDACC__) || defined(__clang__)
#define NVFP4_UNROLL _Pragma("unroll")
#else
#define NVFP4_UNROLL _Pragma("GCC unroll 16")
#endif

// Before a loop that must stay one: unrolled, its addresses would all be kept in registers.
#if defined(__CUDACC__) || defined(__clang__)
#define NVFP4_KEEP_LOOP _Pragma("unroll 1")
#else
#define NVFP4_KEEP_LOOP
#endif

namespace nvfp4 {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

constexpr float float_max = 3.402823466e+38f;

struct U32x1 {
    u32 v;
    U32x1() = default;
    NVFP4_HD_MEMBER U32x1(u32 x) : v(x) {}
};

struct F32x1 {
    static constexpr int lanes = 1;
    using Word = U32x1;
    float v;
    F32x1() = default;
    NVFP4_HD_MEMBER F32x1(float x) : v(x) {}
};

// On the device the operators are the intrinsics that nvcc never contracts into an FMA; on the host the sources are
// compiled with -ffp-contract=off.
#if defined(__CUDA_ARCH__)
NVFP4_HD F32x1 operator+(F32x1 a, F32x1 b) { return __fadd_rn(a.v, b.v); }
NVFP4_HD F32x1 operator-(F32x1 a, F32x1 b) { return __fsub_rn(a.v, b.v); }
NVFP4_HD F32x1 operator*(F32x1 a, F32x1 b) { return __fmul_rn(a.v, b.v); }
NVFP4_HD F32x1 operator/(F32x1 a, F32x1 b) { return __fdiv_rn(a.v, b.v); }
NVFP4_HD U32x1 bits(F32x1 a) { return __float_as_uint(a.v); }
NVFP4_HD F32x1 real(U32x1 a) { return __uint_as_float(a.v); }
NVFP4_HD U32x1 add_down(F32x1 a, F32x1 b) { return __float_as_uint(__fadd_rz(a.v, b.v)); }
NVFP4_HD U32x1 trunc_int(F32x1 a) { return add_down(a, 8388608.0f).v - 0x4B000000u; }
#else
NVFP4_HD F32x1 operator+(F32x1 a, F32x1 b) { return a.v + b.v; }
NVFP4_HD F32x1 operator-(F32x1 a, F32x1 b) { return a.v - b.v; }
NVFP4_HD F32x1 operator*(F32x1 a, F32x1 b) { return a.v * b.v; }
NVFP4_HD F32x1 operator/(F32x1 a, F32x1 b) { return a.v / b.v; }
NVFP4_HD U32x1 bits(F32x1 a) {
    u32 x;
    __builtin_memcpy(&x, &a.v, 4);
    return x;
}
NVFP4_HD F32x1 real(U32x1 a) {
    float x;
    __builtin_memcpy(&x, &a.v, 4);
    return x;
}
NVFP4_HD U32x1 trunc_int(F32x1 a) { return static_cast<u32>(static_cast<i32>(a.v)); }
// The bits of a + b, magnitudes, a the smaller, rounded toward zero.
NVFP4_HD U32x1 add_down(F32x1 a, F32x1 b) {
    const F32x1 nearest = a + b;
    return bits(nearest).v - ((nearest - b).v > a.v ? 1u : 0u);
}
#endif

// For 0 <= a <= 2^22: 2^23 has a unit of one in the last place, so the addition rounds to nearest even (and above, on GPUs,
// whose conversions have an eighth of an addition's rate, toward zero).
NVFP4_HD U32x1 round_int(F32x1 a) { return bits(a + F32x1(8388608.0f)).v - 0x4B000000u; }
NVFP4_HD F32x1 to_float(U32x1 a) { return static_cast<float>(static_cast<i32>(a.v)); }

NVFP4_HD U32x1 operator+(U32x1 a, U32x1 b) { return a.v + b.v; }
NVFP4_HD U32x1 operator-(U32x1 a, U32x1 b) { return a.v - b.v; }
NVFP4_HD U32x1 operator&(U32x1 a, U32x1 b) { return a.v & b.v; }
NVFP4_HD U32x1 operator|(U32x1 a, U32x1 b) { return a.v | b.v; }
NVFP4_HD U32x1 operator^(U32x1 a, U32x1 b) { return a.v ^ b.v; }
NVFP4_HD U32x1 operator<<(U32x1 a, int n) { return a.v << n; }
NVFP4_HD U32x1 operator>>(U32x1 a, int n) { return a.v >> n; }

NVFP4_HD F32x1 least(F32x1 a, F32x1 b) { return a.v < b.v ? a : b; }
NVFP4_HD F32x1 greatest(F32x1 a, F32x1 b) { return a.v > b.v ? a : b; }
NVFP4_HD bool less(F32x1 a, F32x1 b) { return a.v < b.v; }
NVFP4_HD bool less_int(U32x1 a, U32x1 b) { return static_cast<i32>(a.v) < static_cast<i32>(b.v); }
NVFP4_HD bool equal(U32x1 a, U32x1 b) { return a.v == b.v; }
NVFP4_HD F32x1 select(bool mask, F32x1 a, F32x1 b) { return mask ? a : b; }
NVFP4_HD U32x1 select(bool mask, U32x1 a, U32x1 b) { return mask ? a : b; }

// Low word of a * m, and the high word in `high`.
NVFP4_HD U32x1 multiply_wide(U32x1 a, u32 m, U32x1& high) {
    const u64 product = static_cast<u64>(a.v) * m;
    high = U32x1(static_cast<u32>(product >> 32));
    return static_cast<u32>(product);
}

template <class F>
NVFP4_HD F magnitude(F x) {
    return real(bits(x) & typename F::Word(0x7FFFFFFFu));
}

}  // namespace nvfp4

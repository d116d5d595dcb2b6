// Inline PTX on two values at a time and on what they become, as in ptx.cuh: with the section of the PTX ISA that defines it
// and, beside it, its model on the CPU.
#pragma once
#include "arch/ptx.cuh"

#if defined(__CUDA_ARCH__)
// The conversion to E2M1 exists in the targets of its architectures and families alone (PTX ISA, cvt).
#if defined(NVFP4_OF_FAMILY) && __CUDA_ARCH__ >= 1000
#define NVFP4_CONVERTS_TO_E2M1
#endif
#if __CUDA_ARCH__ >= 890
#define NVFP4_CONVERTS_TO_E4M3
#endif
#if __CUDA_ARCH__ >= 1000
#define NVFP4_COMPUTES_PAIRS
#endif
#endif

namespace nvfp4 {

// Two fp32, on which sm_100 and newer compute in one instruction.
struct Pair {
    float x, y;
};

#if defined(NVFP4_COMPUTES_PAIRS)
// (PTX ISA, add, sub, mul and fma with .f32x2)
#define NVFP4_OF_PAIRS(instruction, a, b, d)                                                                              \
    asm("{ .reg .b64 a, b, d; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5};\n" instruction " d, a, b; mov.b64 {%0, %1}, d; }" \
        : "=f"(d.x), "=f"(d.y) : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y))
NVFP4_HD Pair operator+(Pair a, Pair b) {
    Pair d;
    NVFP4_OF_PAIRS("add.rn.f32x2", a, b, d);
    return d;
}
NVFP4_HD Pair operator-(Pair a, Pair b) {
    Pair d;
    NVFP4_OF_PAIRS("sub.rn.f32x2", a, b, d);
    return d;
}
NVFP4_HD Pair operator*(Pair a, Pair b) {
    Pair d;
    NVFP4_OF_PAIRS("mul.rn.f32x2", a, b, d);
    return d;
}
#undef NVFP4_OF_PAIRS
// a b + c, rounded once.
NVFP4_HD Pair fused(Pair a, Pair b, Pair c) {
    Pair d;
    asm("{ .reg .b64 a, b, c, d; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5}; mov.b64 c, {%6, %7};\n"
        "fma.rn.f32x2 d, a, b, c; mov.b64 {%0, %1}, d; }"
        : "=f"(d.x), "=f"(d.y) : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y), "f"(c.x), "f"(c.y));
    return d;
}
#else
NVFP4_HD Pair operator+(Pair a, Pair b) { return {(F32x1(a.x) + F32x1(b.x)).v, (F32x1(a.y) + F32x1(b.y)).v}; }
NVFP4_HD Pair operator-(Pair a, Pair b) { return {(F32x1(a.x) - F32x1(b.x)).v, (F32x1(a.y) - F32x1(b.y)).v}; }
NVFP4_HD Pair operator*(Pair a, Pair b) { return {(F32x1(a.x) * F32x1(b.x)).v, (F32x1(a.y) * F32x1(b.y)).v}; }
NVFP4_HD Pair fused(Pair a, Pair b, Pair c) { return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)}; }
#endif

#if defined(__CUDACC__)

// Four of the eight bytes of a (0 to 3) and b (4 to 7), by the nibbles of the selector, the lowest byte first; 8 more gives each
// bit the highest of the byte (PTX ISA, prmt).
template <u32 selector>
static __device__ __forceinline__ u32 bytes_of(u32 a, u32 b) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "n"(selector));
    return d;
}

// The larger of a magnitude and of b's, NaN if either is, as bits; of both halves likewise; and of these the smaller of a's
// magnitude and b (PTX ISA, abs, max, min).
static __device__ __forceinline__ u32 larger_fp32(u32 a, u32 b) {
    u32 d;
    asm("{ .reg .f32 a, b, d; mov.b32 a, %1; mov.b32 b, %2; abs.f32 b, b; max.NaN.f32 d, a, b; mov.b32 %0, d; }" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
static __device__ __forceinline__ u32 larger_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("{ .reg .b32 b; abs.bf16x2 b, %2; max.NaN.bf16x2 %0, %1, b; }" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
static __device__ __forceinline__ u32 larger_f16x2(u32 a, u32 b) {
    u32 d;
    asm("{ .reg .b32 b; abs.f16x2 b, %2; max.NaN.f16x2 %0, %1, b; }" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
static __device__ __forceinline__ u32 bounded_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("{ .reg .b32 a; abs.bf16x2 a, %1; min.bf16x2 %0, a, %2; }" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

#else  // the model

template <u32 selector>
static inline u32 bytes_of(u32 a, u32 b) {
    const u64 both = static_cast<u64>(b) << 32 | a;
    u32 d = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 pick = selector >> (4 * i) & 15u;
        u32 byte = static_cast<u32>(both >> (8 * (pick & 7u))) & 0xFFu;
        if (pick & 8u) byte = byte & 0x80u ? 0xFFu : 0u;
        d |= byte << (8 * i);
    }
    return d;
}

static inline u32 larger_fp32(u32 a, u32 b) {
    b &= 0x7FFFFFFFu;
    return static_cast<i32>(a) > static_cast<i32>(b) ? a : b;
}
static inline u32 larger_f16x2(u32 a, u32 b) { return (larger_fp32(a << 16, b << 16) >> 16) | (larger_fp32(a, b) & 0xFFFF0000u); }
static inline u32 larger_bf16x2(u32 a, u32 b) { return larger_f16x2(a, b); }
static inline u32 bounded_bf16x2(u32 a, u32 b) {
    const auto half = [](u32 a, u32 b) { return a < b ? a : b; };
    return half(a & 0x7FFFu, b & 0xFFFFu) | half(a & 0x7FFF0000u, b & 0xFFFF0000u);
}

#endif

// The same byte of four words.
template <int byte>
static __device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 c, u32 d) {
    return bytes_of<0x5410u>(bytes_of<static_cast<u32>(byte) * 0x11u + 0x40u>(a, b), bytes_of<static_cast<u32>(byte) * 0x11u + 0x40u>(c, d));
}

// What is added to a magnitude m so that a unit in the last place of the sum is the step at m of a format with so many bits of
// mantissa, whose lowest binade of normal numbers has fp32's exponent field `lowest`, and so that the low bits of the sum are m's
// code: they begin with the steps of the binades below, an even number, which leaves ties alone. base: (23 - mantissa) << 23 less
// lowest << mantissa, and what else is to be added.
template <int lowest, int mantissa>
static __device__ __forceinline__ F32x1 anchor(F32x1 m, u32 base) {
    const u32 exponent = bits(F32x1(fmaxf(m.v, real(U32x1(static_cast<u32>(lowest) << 23)).v))).v >> 23;
    return real(U32x1(exponent * ((1u << 23) + (1u << mantissa)) + base));
}
// A magnitude's code, to nearest, ties to even; above it stand other bits, the lowest byte is clean.
template <int lowest, int mantissa>
static __device__ __forceinline__ u32 on_grid(F32x1 m) {
    return bits(m + anchor<lowest, mantissa>(m, (static_cast<u32>(23 - mantissa) << 23) - (static_cast<u32>(lowest) << mantissa))).v;
}

// E4M3 code of a magnitude, no NaN, to nearest, ties to even, beyond 448 to 448 (PTX ISA, cvt.e4m3x2: the second operand goes to
// the lower half).
static __device__ __forceinline__ u32 e4m3_magnitude(F32x1 m) {
#if defined(NVFP4_CONVERTS_TO_E4M3)
    u16 code;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(code) : "f"(0.0f), "f"(m.v));
    return code;
#else
    return on_grid<121, 3>(F32x1(fminf(m.v, 448.0f))) & 0xFFu;
#endif
}

// E4M3 codes of four values likewise, the first in the lowest byte.
static __device__ __forceinline__ u32 e4m3_word(Pair a, Pair b) {
#if defined(NVFP4_CONVERTS_TO_E4M3)
    u32 word;
    asm("{ .reg .b16 a, b;\n"
        "cvt.rn.satfinite.e4m3x2.f32 a, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 b, %4, %3;\n"
        "mov.b32 %0, {a, b}; }"
        : "=r"(word) : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y));
    return word;
#else
    const float v[4] = {a.x, a.y, b.x, b.y};
    u32 sums[4], minus[4];
    NVFP4_UNROLL
    for (int i = 0; i < 4; ++i) {
        sums[i] = on_grid<121, 3>(F32x1(fminf(fabsf(v[i]), 448.0f)));
        minus[i] = bits(F32x1(v[i])).v;
    }
    return bytes_of<0>(sums[0], sums[1], sums[2], sums[3]) | (bytes_of<3>(minus[0], minus[1], minus[2], minus[3]) & 0x80808080u);
#endif
}

#if defined(NVFP4_CONVERTS_TO_E2M1)
// E2M1 codes of eight values, to nearest, ties to even, beyond 6 to 6; v[0].x in the lowest four bits (PTX ISA, cvt.e2m1x2: the
// second operand goes to the lower half). As e2m1_nearest, but for NaN, which op.py's contract keeps away.
static __device__ __forceinline__ u32 e2m1_word(const Pair* v) {
    u32 word;
    asm("{ .reg .b8 a, b, c, d;\n"
        "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
        "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
        "mov.b32 %0, {a, b, c, d}; }"
        : "=r"(word)
        : "f"(v[0].x), "f"(v[0].y), "f"(v[1].x), "f"(v[1].y), "f"(v[2].x), "f"(v[2].y), "f"(v[3].x), "f"(v[3].y));
    return word;
}
#endif

// E2M1 codes of eight magnitudes below 7, to nearest, ties to even.
static __device__ __forceinline__ u32 e2m1_magnitudes(const Pair* m) {
    u32 even[4], odd[4];
    NVFP4_UNROLL
    for (int k = 0; k < 4; ++k) {
        even[k] = on_grid<127, 1>(F32x1(m[k].x));
        odd[k] = on_grid<127, 1>(F32x1(m[k].y));
    }
    return bytes_of<0>(even[0], even[1], even[2], even[3]) + (bytes_of<0>(odd[0], odd[1], odd[2], odd[3]) << 4);
}

// E2M1 codes of eight magnitudes up to 6, as e2m1_stochastic: the next one up where `noise`, a byte for each, carries. The grid has
// eight bits more of mantissa, whose rest is cut off, and a value's noise rides in the lowest byte of what is added to it.
static __device__ __forceinline__ u32 e2m1_stochastic_magnitudes(const Pair* m, u32 noise_low, u32 noise_high) {
    constexpr u32 base = (14u << 23) - (127u << 9);
    const auto sum = [](float magnitude, u32 from) {
        const F32x1 m(magnitude);
        return add_down(m, anchor<127, 9>(m, from)).v;
    };
    u32 even[4], odd[4];
    NVFP4_UNROLL
    for (int k = 0; k < 4; ++k) {
        const u32 noise = k < 2 ? noise_low : noise_high;
        even[k] = sum(m[k].x, k % 2 ? bytes_of<0x7652u>(noise, base) : bytes_of<0x7650u>(noise, base));
        odd[k] = sum(m[k].y, k % 2 ? bytes_of<0x7653u>(noise, base) : bytes_of<0x7651u>(noise, base));
    }
    return bytes_of<1>(even[0], even[1], even[2], even[3]) + (bytes_of<1>(odd[0], odd[1], odd[2], odd[3]) << 4);
}

}  // namespace nvfp4

// Lanes of four: Advanced SIMD of AArch64, which every 64-bit Arm has.
#pragma once
#include <arm_neon.h>

#include "numerics/lane.h"

namespace nvfp4 {
namespace NVFP4_ISA {

struct U {
    uint32x4_t v;
    U() = default;
    U(uint32x4_t x) : v(x) {}
    U(u32 x) : v(vdupq_n_u32(x)) {}
};

struct F {
    static constexpr int lanes = 4;
    using Word = U;
    float32x4_t v;
    F() = default;
    F(float32x4_t x) : v(x) {}
    F(float x) : v(vdupq_n_f32(x)) {}
};

struct Mask {
    uint32x4_t v;
};

static inline F operator+(F a, F b) { return vaddq_f32(a.v, b.v); }
static inline F operator-(F a, F b) { return vsubq_f32(a.v, b.v); }
static inline F operator*(F a, F b) { return vmulq_f32(a.v, b.v); }
static inline F operator/(F a, F b) { return vdivq_f32(a.v, b.v); }
static inline U operator+(U a, U b) { return vaddq_u32(a.v, b.v); }
static inline U operator-(U a, U b) { return vsubq_u32(a.v, b.v); }
static inline U operator&(U a, U b) { return vandq_u32(a.v, b.v); }
static inline U operator|(U a, U b) { return vorrq_u32(a.v, b.v); }
static inline U operator^(U a, U b) { return veorq_u32(a.v, b.v); }
static inline U operator<<(U a, int n) { return a.v << n; }
static inline U operator>>(U a, int n) { return a.v >> n; }
static inline U bits(F a) { return vreinterpretq_u32_f32(a.v); }
static inline F real(U a) { return vreinterpretq_f32_u32(a.v); }
static inline U round_int(F a) { return vreinterpretq_u32_s32(vcvtnq_s32_f32(a.v)); }
static inline U trunc_int(F a) { return vreinterpretq_u32_s32(vcvtq_s32_f32(a.v)); }
static inline F to_float(U a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a.v)); }
static inline Mask less(F a, F b) { return {vcltq_f32(a.v, b.v)}; }
static inline Mask less_int(U a, U b) { return {vcltq_s32(vreinterpretq_s32_u32(a.v), vreinterpretq_s32_u32(b.v))}; }
static inline Mask equal(U a, U b) { return {vceqq_u32(a.v, b.v)}; }
static inline U select(Mask m, U a, U b) { return vbslq_u32(m.v, a.v, b.v); }
static inline F select(Mask m, F a, F b) { return vbslq_f32(m.v, a.v, b.v); }
// Not the instructions of these names, which give NaN for a NaN in either operand: here the second operand comes back.
static inline F least(F a, F b) { return select(less(a, b), a, b); }
static inline F greatest(F a, F b) { return select(less(b, a), a, b); }

static inline U multiply_wide(U a, u32 m, U& high) {
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a.v), m));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_n_u32(a.v, m));
    high = vuzp2q_u32(first, second);
    return vuzp1q_u32(first, second);
}

static inline F load(const float* p) { return vld1q_f32(p); }
static inline void store(float* p, F x) { vst1q_f32(p, x.v); }
static inline U load(const u32* p) { return vld1q_u32(p); }
static inline void store(u32* p, U x) { vst1q_u32(p, x.v); }
static inline F load_bf16(const u16* p) { return real(vshll_n_u16(vld1_u16(p), 16)); }
static inline F load_fp16(const u16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

static inline U load_bytes(const u8* p) {
    u32 four;
    __builtin_memcpy(&four, p, 4);
    return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}
// The first `count` words or bytes, zero in the other lanes.
template <class T>
static inline U load_some(const T* p, i64 count) {
    u32 four[4] = {};
    for (i64 i = 0; i < count; ++i) four[i] = p[i];
    return load(four);
}
static inline void store_bytes(u8* p, U x) {
    const uint16x4_t words = vmovn_u32(x.v);
    const u32 four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
    __builtin_memcpy(p, &four, 4);
}

static inline void store_pairs(u32* p, U low, U high) {
    store(p, U(vzip1q_u32(low.v, high.v)));
    store(p + 4, U(vzip2q_u32(low.v, high.v)));
}

// E2M1 values in bf16, which holds them: of sixteen codes, the low nibbles of `codes`, values 0 .. 7 and 8 .. 15.
struct Sixteen {
    uint16x8_t half[2];
};
static inline Sixteen e2m1_in_bf16(uint8x16_t codes) {
    alignas(16) static const u8 low[16] = {0, 0, 0x80, 0xC0, 0, 0x40, 0x80, 0xC0, 0, 0, 0x80, 0xC0, 0, 0x40, 0x80, 0xC0};
    alignas(16) static const u8 high[16] = {0,    0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40,
                                            0x80, 0xBF, 0xBF, 0xBF, 0xC0, 0xC0, 0xC0, 0xC0};
    const uint8x16_t lows = vqtbl1q_u8(vld1q_u8(low), codes), highs = vqtbl1q_u8(vld1q_u8(high), codes);
    return {{vreinterpretq_u16_u8(vzip1q_u8(lows, highs)), vreinterpretq_u16_u8(vzip2q_u8(lows, highs))}};
}

// The sixteen values of eight bytes, low nibble first.
static inline void load_e2m1(const u8* p, F* out) {
    const uint8x8_t bytes = vld1_u8(p), low = vand_u8(bytes, vdup_n_u8(15)), high = vshr_n_u8(bytes, 4);
    const Sixteen values = e2m1_in_bf16(vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high)));
    for (int i = 0; i < 2; ++i) {
        out[2 * i] = real(vshll_n_u16(vget_low_u16(values.half[i]), 16));
        out[2 * i + 1] = real(vshll_high_n_u16(values.half[i], 16));
    }
}

static inline F fma(F a, F b, F c) { return vfmaq_f32(c.v, a.v, b.v); }
static inline float sum(F x) { return vaddvq_f32(x.v); }
static inline float largest(F x) { return vmaxnmvq_f32(x.v); }
static inline U lane_numbers() {
    alignas(16) static const u32 numbers[4] = {0, 1, 2, 3};
    return load(numbers);
}

static inline void store_bf16(u16* p, F x) {
    const U b = bits(x);
    const U rounded = (b + U(0x7FFFu) + ((b >> 16) & U(1u))) >> 16;
    const Mask number{vceqq_f32(x.v, x.v)};
    vst1_u16(p, vmovn_u32(select(number, rounded, (b >> 16) | U(0x40u)).v));
}
static inline void store_fp16(u16* p, F x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x.v))); }

static inline void transpose4(const float* in, i64 in_stride, float* out, i64 out_stride) {
    const float32x4_t r0 = vld1q_f32(in), r1 = vld1q_f32(in + in_stride);
    const float32x4_t r2 = vld1q_f32(in + 2 * in_stride), r3 = vld1q_f32(in + 3 * in_stride);
    const float32x4_t even[2] = {vzip1q_f32(r0, r2), vzip2q_f32(r0, r2)}, odd[2] = {vzip1q_f32(r1, r3), vzip2q_f32(r1, r3)};
    for (int i = 0; i < 2; ++i) {
        vst1q_f32(out + 2 * i * out_stride, vzip1q_f32(even[i], odd[i]));
        vst1q_f32(out + (2 * i + 1) * out_stride, vzip2q_f32(even[i], odd[i]));
    }
}

static inline void transpose16(const float* in, i64 in_stride, float* out, i64 out_stride) {
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 16; j += 4) transpose4(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    }
}

// sums[i] = the sum of x[i]'s lanes: each addition of neighbours serves two vectors.
static inline void sums16(const F* x, float* sums) {
    for (int i = 0; i < 16; i += 4) {
        vst1q_f32(sums + i, vpaddq_f32(vpaddq_f32(x[i].v, x[i + 1].v), vpaddq_f32(x[i + 2].v, x[i + 3].v)));
    }
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

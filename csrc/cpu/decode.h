// Decoding one block into sixteen fp32 values; used by dequantize and by matmul's packing.
#pragma once
#include "numerics/e2m1.h"
#include "numerics/mxfp8.h"
#include "steps.h"

namespace nvfp4 {
namespace NVFP4_ISA {

alignas(64) static const float e2m1_values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                                  -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// Values of all E4M3 codes: a scale is one load. Made by the compiler: code of this instruction set that runs as the library is
// loaded would end the process on a CPU without it.
struct E4m3Values {
    float v[256];
    constexpr E4m3Values() : v{} {
        for (int code = 0; code < 128; ++code) {
            const int exponent = code >> 3, mantissa = code & 7;
            float value = (exponent ? 8.0f + mantissa : mantissa) * 0.001953125f;
            for (int i = 1; i < exponent; ++i) value *= 2.0f;
            if (code == 127) value = __builtin_nanf("");
            v[code] = value;
            v[code + 128] = -value;
        }
    }
};
static constexpr E4m3Values e4m3_values;

static inline float e8m0_value(u8 code) { return e8m0_decode<F32x1>(U32x1(code)).v; }

// The sixteen values of an NVFP4 block (8 bytes) times `scale`.
static inline void decode_nvfp4(const u8* codes, float scale, F* out) {
#if defined(NVFP4_ISA_NEON)
    load_e2m1(codes, out);
    for (int i = 0; i < vectors16; ++i) out[i] = out[i] * F(scale);
#else
    U nibbles[vectors16];
    load_nibbles(codes, nibbles);
    for (int i = 0; i < vectors16; ++i) out[i] = lookup16(e2m1_values, nibbles[i]) * F(scale);
#endif
}

// An element of E4M3, as those of simd.h.
struct E4m3 { u8 bits; };
static inline F load(const E4m3* p) { return e4m3_decode<F>(load_bytes(&p->bits)); }

// Sixteen E4M3 values times `scale`.
static inline void decode_e4m3(const u8* codes, float scale, F* out) {
    for (int i = 0; i < vectors16; ++i) out[i] = e4m3_decode<F>(load_bytes(codes + i * F::lanes)) * F(scale);
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

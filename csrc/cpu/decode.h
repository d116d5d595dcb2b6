// Decoding one block into sixteen fp32 values; used by dequantize and by matmul's packing.
#pragma once
#include "numerics/e2m1.h"
#include "numerics/mxfp8.h"
#include "simd.h"

namespace nvfp4 {
namespace NVFP4_ISA {

alignas(64) static const float e2m1_values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                                  -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// The sixteen values of an NVFP4 block (8 bytes) times `scale`.
static inline void decode_nvfp4(const u8* codes, float scale, float* out) {
    alignas(16) u8 nibbles[16];
    for (int i = 0; i < 8; ++i) {
        nibbles[2 * i] = codes[i] & 15;
        nibbles[2 * i + 1] = codes[i] >> 4;
    }
    for (int i = 0; i < 16; i += F::lanes) store(out + i, lookup16(e2m1_values, load_bytes(nibbles + i)) * F(scale));
}

// Sixteen E4M3 values times `scale`.
static inline void decode_e4m3(const u8* codes, float scale, float* out) {
    for (int i = 0; i < 16; i += F::lanes) store(out + i, e4m3_decode<F>(load_bytes(codes + i)) * F(scale));
}

static inline float e4m3_value(u8 code) { return e4m3_decode<F32x1>(U32x1(code)).v; }
static inline float e8m0_value(u8 code) { return e8m0_decode<F32x1>(U32x1(code)).v; }

}  // namespace NVFP4_ISA
}  // namespace nvfp4

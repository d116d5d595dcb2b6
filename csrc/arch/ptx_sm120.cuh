// Inline PTX of sm_120 and sm_121 (the family target 120f), as ptx.cuh has that of all architectures.
#pragma once
#include "arch/kernel.cuh"
#include "numerics/e2m1.h"
#include "numerics/e4m3.h"

// The block-scaled mma.sync exists in the targets of its architectures and their family alone (PTX ISA, mma, "Target ISA
// Notes"); the model runs it anywhere.
#if !defined(__CUDACC__)
#define NVFP4_MULTIPLIES_E2M1
#elif defined(NVFP4_OF_FAMILY) && __CUDA_ARCH__ >= 1200 && __CUDA_ARCH__ < 1300
#define NVFP4_MULTIPLIES_E2M1
#endif

namespace nvfp4 {

#if defined(__CUDACC__)

// 4 bytes from global to shared memory, or, with no `bytes`, zeros (PTX ISA, cp.async).
static __device__ __forceinline__ void copy_async4(void* to, const void* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

// d += (a under its scales) (b under its scales), a 16x64 and b 64x8 of E2M1, a scale in ue4m3 for 16 values along k, d fp32
// (PTX ISA, mma.sync.aligned.m16n8k64, "Matrix Fragments for mma.m16n8k64 with floating point type", and "Block Scaling for
// mma.sync"). Of lane 4 g + q, lowest nibble first: a[0] row g, k 8q to 8q + 7, a[1] row g + 8, a[2], a[3] the same 32 k on;
// b0 the same k of column g, b1 32 k on; d[0], d[1] row g, columns 2q, 2q + 1, d[2], d[3] row g + 8. Scales, lowest byte
// first: with the selectors {0, 0} the rows g and g + 8 have theirs from lanes 4 g and 4 g + 1, column g has its from lane 4 g.
// Triton's compiler emits these selectors and this layout for tl.dot_scaled (tests/native/test_cuda_sm120.py); others would
// spare some loads of scales.
static __device__ __forceinline__ void multiply_e2m1(float* d, const u32* a, u32 b0, u32 b1, u32 a_scales, u32 b_scales) {
    asm volatile(
        "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, %10, {0, 0}, %11, {0, 0};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(a_scales), "r"(b_scales));
}

#else  // the model

static inline void copy_async4(void* to, const void* from, int bytes) { host_model::copy_async(to, from, 4, bytes); }

// Four times the product of two codes, the second in the upper half of a byte: an integer. And what scales are.
struct E2M1Products {
    int of[256];
    float scale[128];  // ue4m3 has seven bits: what the eighth does, the ISA does not say
    E2M1Products() {
        for (u32 i = 0; i < 256; ++i) of[i] = int(4 * e2m1_decode<F32x1>(i & 15u).v * e2m1_decode<F32x1>(i >> 4).v);
        for (u32 i = 0; i < 128; ++i) scale[i] = e4m3_decode<F32x1>(i).v;
    }
};

__attribute__((optimize("O3"))) static inline void multiply_e2m1(float* d, const u32* a, u32 b0, u32 b1, u32 a_scales, u32 b_scales) {
    static const E2M1Products products;
    const u32 mine[8] = {a[0], a[1], a[2], a[3], b0, b1, a_scales, b_scales};
    const auto* all = host_model::exchange("mma.sync.m16n8k64.block_scale", mine, sizeof mine);
    const auto of = [all](int lane, int word) {
        u32 x;
        std::memcpy(&x, all[lane] + 4 * word, 4);
        return x;
    };
    const int g = host_model::lane() / 4, q = host_model::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i / 2), col = 2 * q + i % 2;
        const u32 of_row = of(row % 8 * 4 + row / 8, 6), of_col = of(col * 4, 7);
        double sum = d[i];
        for (int block = 0; block < 4; ++block) {
            int part = 0;
            for (int word = 2 * block; word < 2 * block + 2; ++word) {  // of eight k each
                u32 x = of(row % 8 * 4 + word % 4, row / 8 + word / 4 * 2), y = of(col * 4 + word % 4, 4 + word / 4);
                for (int k = 0; k < 8; ++k, x >>= 4, y >>= 4) part += products.of[(x & 15u) | (y & 15u) << 4];
            }
            sum += part * 0.25 * products.scale[of_row >> 8 * block & 0x7Fu] * products.scale[of_col >> 8 * block & 0x7Fu];
        }
        d[i] = static_cast<float>(sum);
    }
}

#endif

}  // namespace nvfp4

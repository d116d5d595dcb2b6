// The inner kernel: c[rows, columns] += a[rows, steps] b[steps, columns], sums in registers.
#pragma once
#include "operand.h"

namespace nvfp4 {
namespace NVFP4_ISA {

// Registers: rows x columns / lanes sums, one row of b, one broadcast of a. AVX-512 and NEON have 32: 6 x 4 + 4 + 1; with fewer than
// about 12 sums in flight the latency of the multiply-add shows.
#if defined(NVFP4_ISA_AVX512)
constexpr i64 kernel_rows = 6, panel = 64;
#elif defined(NVFP4_ISA_AVX2) || defined(NVFP4_ISA_NEON)
constexpr i64 kernel_rows = 6, panel = 16;
#else
constexpr i64 kernel_rows = 2, panel = 16;
#endif

template <class P, int rows, int width>
static inline void multiply_tile(const typename P::Step* a, i64 a_stride, const typename P::Step* b, i64 steps, float* c,
                                 i64 c_stride, bool first) {
    constexpr int vectors = width / F::lanes;
    F sum[rows][vectors];
    for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < vectors; ++v) sum[i][v] = F(0.0f);
    }
    for (i64 s = 0; s < steps; ++s) {
        decltype(load(b)) right[vectors];
        for (int v = 0; v < vectors; ++v) right[v] = load(b + s * width + v * F::lanes);
        for (int i = 0; i < rows; ++i) {
            const auto left = broadcast(a[i * a_stride + s]);
            for (int v = 0; v < vectors; ++v) sum[i][v] = dot(sum[i][v], left, right[v]);
        }
    }
    for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < vectors; ++v) {
            float* at = c + i * c_stride + v * F::lanes;
            store(at, first ? sum[i][v] : load(at) + sum[i][v]);
        }
    }
}

template <class P, int width>
static inline void multiply_rows(const typename P::Step* a, i64 a_stride, i64 rows, const typename P::Step* b, i64 steps,
                                 float* c, i64 c_stride, bool first) {
    for (; rows >= kernel_rows; rows -= kernel_rows) {
        multiply_tile<P, kernel_rows, width>(a, a_stride, b, steps, c, c_stride, first);
        a += kernel_rows * a_stride;
        c += kernel_rows * c_stride;
    }
    switch (rows) {
        case 1: return multiply_tile<P, 1, width>(a, a_stride, b, steps, c, c_stride, first);
        case 2: return multiply_tile<P, 2, width>(a, a_stride, b, steps, c, c_stride, first);
        case 3: return multiply_tile<P, 3, width>(a, a_stride, b, steps, c, c_stride, first);
        case 4: return multiply_tile<P, 4, width>(a, a_stride, b, steps, c, c_stride, first);
        case 5: return multiply_tile<P, 5, width>(a, a_stride, b, steps, c, c_stride, first);
        default: return;
    }
}

template <class P>
static inline void multiply_block(const typename P::Step* a, i64 a_stride, i64 rows, const typename P::Step* b, i64 width,
                                  i64 steps, float* c, i64 c_stride, bool first) {
    if constexpr (panel == 64) {
        switch (width) {
            case 64: return multiply_rows<P, 64>(a, a_stride, rows, b, steps, c, c_stride, first);
            case 48: return multiply_rows<P, 48>(a, a_stride, rows, b, steps, c, c_stride, first);
            case 32: return multiply_rows<P, 32>(a, a_stride, rows, b, steps, c, c_stride, first);
        }
    }
    multiply_rows<P, 16>(a, a_stride, rows, b, steps, c, c_stride, first);
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// Runs of any length as whole vectors and, at the end, a part of one.
#pragma once
#include "simd.h"

namespace nvfp4 {
namespace NVFP4_ISA {

struct Whole {};
struct Part {
    int count;  // 1 .. lanes - 1
};

static inline int size(Whole) { return F::lanes; }
static inline int size(Part part) { return part.count; }

template <class T>
static inline F load(const T* p, Whole) { return load(p); }
template <class T>
static inline void store(T* p, F x, Whole) { store(p, x); }

// The lanes beyond the part are zero.
template <class T>
static inline F load(const T* p, Part part) {
    T run[F::lanes] = {};
    for (int i = 0; i < part.count; ++i) run[i] = p[i];
    return load(run);
}
template <class T>
static inline void store(T* p, F x, Part part) {
    T run[F::lanes];
    store(run, x);
    for (int i = 0; i < part.count; ++i) p[i] = run[i];
}

constexpr int sums = 4;  // a vector of sums apart from the last three hides the latency of an addition

// body(i, k, extent) for the vectors of [0, n): i where the vector starts, k = 0 .. 3 in turn, extent Whole or Part.
template <class Body>
static inline void over(i64 n, const Body& body) {
    i64 i = 0;
    for (; i + sums * F::lanes <= n; i += sums * F::lanes) {
        NVFP4_UNROLL
        for (int k = 0; k < sums; ++k) body(i + k * F::lanes, k, Whole{});
    }
    for (; i + F::lanes <= n; i += F::lanes) body(i, 0, Whole{});
    if (i < n) body(i, 1, Part{static_cast<int>(n - i)});
}

// out[i] = the sum over b of blocks[b][i], in the order of b: sums over many rows are made so, block by block, whatever threads.
static inline void add_blocks(const float* blocks, i64 count, i64 length, float* out) {
    over(length, [&](i64 i, int, auto extent) {
        F sum = F(0.0f);
        for (i64 b = 0; b < count; ++b) sum = sum + load(blocks + b * length + i, extent);
        store(out + i, sum, extent);
    });
}

static inline float total(const F* s) { return sum((s[0] + s[1]) + (s[2] + s[3])); }

}  // namespace NVFP4_ISA
}  // namespace nvfp4

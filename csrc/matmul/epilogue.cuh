// From a sum under the block scales to a result in memory: what the kernels for packed weights share.
#pragma once
#include "arch/values.cuh"
#include "decode.cuh"
#include "launch.h"

namespace nvfp4 {

static __device__ __forceinline__ float load_as(const void* from, i32 dtype, i64 i) {
    if (dtype == 0) return static_cast<const float*>(from)[i];
    const u16 raw = static_cast<const u16*>(from)[i];
    return (dtype == 1 ? widen_one<Half>(raw) : widen_one<Brain>(raw)).v;
}

// The global scale of a group; one that is infinite says NaN too.
static __device__ __forceinline__ float scale_of(const WeightOnlyLaunch& p, i64 group = 0) {
    const float g = p.global_scale[group];
    return (bits(F32x1(g)).v & 0x7F800000u) == 0x7F800000u ? real(U32x1(0x7FC00000u)).v : g;
}

// A sum of packed products (packed_unit below their values) of a row, with its bias, and what follows.
static __device__ __forceinline__ F32x1 scaled_sum(const WeightOnlyLaunch& p, float g, i64 row, float sum) {
    F32x1 y = F32x1(sum) * F32x1(packed_unit) * F32x1(g);
    if (p.bias) y = y + F32x1(load_as(p.bias, p.bias_dtype, row));
    if (!p.relu2) return y;
    if (y.v < 0.0f) y = F32x1(0.0f);  // NaN stays
    return y * y;
}

static __device__ __forceinline__ u32 narrow_to(i32 dtype, F32x1 y) { return dtype == 1 ? Half::narrow(y.v) : Brain::narrow(y.v); }

static __device__ __forceinline__ void finish(const WeightOnlyLaunch& p, float g, i64 row, i64 token, float sum) {
    if (row >= p.rows) return;
    const F32x1 y = scaled_sum(p, g, row, sum);
    const i64 at = token * p.rows + row;
    if (p.out_dtype == 0) {
        float* out = static_cast<float*>(p.out) + at;
        *out = p.accumulate ? (F32x1(*out) + y).v : y.v;
    } else {
        static_cast<u16*>(p.out)[at] = static_cast<u16>(narrow_to(p.out_dtype, y));
    }
}

// Four rows of a token, at once: out begins at a multiple of 16 bytes.
static __device__ __forceinline__ void finish4(const WeightOnlyLaunch& p, float g, i64 row, i64 token, float4 sums) {
    if (row >= p.rows) return;  // rows are a multiple of 16
    const F32x1 y[4] = {scaled_sum(p, g, row, sums.x), scaled_sum(p, g, row + 1, sums.y), scaled_sum(p, g, row + 2, sums.z),
                        scaled_sum(p, g, row + 3, sums.w)};
    const i64 at = token * p.rows + row;
    if (p.out_dtype == 0) {
        float4* out = reinterpret_cast<float4*>(static_cast<float*>(p.out) + at);
        const float4 old = p.accumulate ? *out : float4{0, 0, 0, 0};
        const bool add = p.accumulate;
        *out = {add ? (F32x1(old.x) + y[0]).v : y[0].v, add ? (F32x1(old.y) + y[1]).v : y[1].v,
                add ? (F32x1(old.z) + y[2]).v : y[2].v, add ? (F32x1(old.w) + y[3]).v : y[3].v};
    } else {
        u32* out = reinterpret_cast<u32*>(static_cast<u16*>(p.out) + at);
        out[0] = narrow_to(p.out_dtype, y[0]) | narrow_to(p.out_dtype, y[1]) << 16;
        out[1] = narrow_to(p.out_dtype, y[2]) | narrow_to(p.out_dtype, y[3]) << 16;
    }
}

}  // namespace nvfp4

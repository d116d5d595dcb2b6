// Which tokens a block multiplies, and by the matrix of which group.
#pragma once
#include "arch/kernel.cuh"
#include "launch.h"

namespace nvfp4 {

struct Part {
    i64 group, first;  // token
    int count;         // of tokens; 0 for a block beyond all groups
};

// The first token of a group, or of none: offsets that do not ascend give wrong parts, and none outside the tokens.
static __device__ __forceinline__ i64 group_begin(const WeightOnlyLaunch& p, i64 group) {
    const i64 given = p.offsets[group];
    return given < 0 ? 0 : given < p.tokens ? given : p.tokens;
}

// Tokens of a group, and the slots of `most` tokens that they need.
static __device__ __forceinline__ i64 group_size(const WeightOnlyLaunch& p, i64 group) {
    const i64 begin = group_begin(p, group), end = group_begin(p, group + 1);
    return end < begin ? 0 : end - begin;
}

// What slot `slot` has: those of a group follow one another, those of the groups too; an empty group has none.
template <int most, int threads>
static __device__ __forceinline__ Part find_part(const WeightOnlyLaunch& p, i64 slot) {
    if (p.offsets == nullptr) return {0, 0, static_cast<int>(p.tokens)};
    using Sums = i64[threads / 32];
    NVFP4_SHARED(Part, part);
    NVFP4_SHARED(Sums, of_warps);
    const auto slots = [&](i64 group) { return (group_size(p, group) + most - 1) / most; };
    const i64 each = (p.groups + threads - 1) / threads, begin = threadIdx.x * each;
    const i64 end = begin + each < p.groups ? begin + each : p.groups;
    i64 mine = 0;
    for (i64 e = begin; e < end; ++e) mine += slots(e);
    i64 sum = mine;  // of this thread's groups and of all before
    NVFP4_UNROLL
    for (int d = 1; d < 32; d *= 2) {
        const i64 before = __shfl_sync(all_lanes, sum, (lane_index() - d) & 31);
        if (lane_index() >= d) sum += before;
    }
    if (lane_index() == 31) of_warps[warp_index()] = sum;
    if (threadIdx.x == 0) part.count = 0;
    __syncthreads();
    for (int warp = 0; warp < warp_index(); ++warp) sum += of_warps[warp];
    i64 left = slot - (sum - mine);  // slots from this thread's first on
    if (left >= 0 && left < mine) {
        i64 e = begin;
        for (; left >= slots(e); ++e) left -= slots(e);
        const i64 rest = group_size(p, e) - left * most;
        part = {e, group_begin(p, e) + left * most, static_cast<int>(rest < most ? rest : most)};
    }
    __syncthreads();
    return part;
}

// An order that is out of range gives a wrong row of x, and none outside it.
static __device__ __forceinline__ i64 row_of_x(const WeightOnlyLaunch& p, i64 token) {
    if (p.order == nullptr) return token;
    const i64 row = p.order[token] / p.top_k;
    return row < 0 || row >= p.x_rows ? 0 : row;
}

}  // namespace nvfp4

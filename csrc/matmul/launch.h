// What the CUDA kernels of matmul take; ops/matmul/_cuda.py packs it.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

// y [tokens, rows] = g * sum_k x[token, k] w[row, k] (+ bias), w in the packed layout of formats/packed.py. Or so for each
// group of rows that lie together, w being the group's own matrix.
struct WeightOnlyLaunch {
    const void* x;  // bf16, rows that begin at multiples of 16 bytes
    i64 x_rows, x_stride;  // stride in elements
    const u32* codes;           // [rows / 16, length / 64, 32, 4], group after group
    const u32* scales;          // [rows / 16, length / 128, 32], likewise
    const float* global_scale;  // [groups]
    const void* bias;           // [rows] or null
    void* out;                  // [tokens, rows]
    float* partial;  // of each split, in the order of its threads' accumulators; null for one split. sm90.cuh: two for a
                     // block, [token][row]
    u32* arrived;    // [slots, tiles], zero before and after: splits that have left their sums (splits.cuh). sm90.cuh: null
    i64 tokens, rows;
    i64 cols;        // of x; zeros beyond
    i64 length;      // of a packed row, a multiple of 128
    i64 splits;      // sm90.cuh: the blocks that share the work
    i32 bias_dtype, out_dtype;  // 0 fp32, 1 fp16, 2 bf16
    i32 accumulate;             // add to out, which is fp32
    i32 relu2;                  // y, with its bias: max(y, 0)^2
    const i64* offsets;  // group e has the tokens offsets[e] to offsets[e + 1]; null: one group of all
    const i64* order;    // token t reads row order[t] / top_k of x; null: row t
    i64 groups, top_k;
};

struct DecodeLaunch {
    const u32 *codes, *scales;  // as above
    void* out;                  // bf16 [16 slabs, length]
    i64 slabs, length;
};

}  // namespace nvfp4

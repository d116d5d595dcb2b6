// What the kernels of sm100.cuh take; ops/matmul/_cuda_sm100.py packs it.
#pragma once
#include "arch/tensor_map.h"

namespace nvfp4::sm100 {

// Row-major block scales [rows, blocks] to the order that the tensor cores read them in, for both operands (blockIdx.y).
struct SwizzleLaunch {
    const u8* from[2];
    u8* to[2];  // [tiles, ceil(blocks / 4), atoms, 512], see sm100.cuh
    i64 rows[2], tile_rows[2];
    i64 blocks;
};

// y [rows, cols] = (a_global b_global) sum_k a[row, k] b[col, k] (+ bias).
struct BlockScaledLaunch {
    TensorMap a, b;  // codes, boxes of 128 bytes of k by a tile's rows
    const u8 *a_scales, *b_scales;  // as SwizzleLaunch left them
    const float *a_global, *b_global;  // [1]
    const void* bias;                  // [cols] or null
    void* out;                         // [rows, cols]
    i64 rows, cols;
    i64 length;                  // k, a multiple of 16
    i32 bias_dtype, out_dtype;   // 0 fp32, 1 fp16, 2 bf16
    i64 accumulate;              // add to out, which is fp32
};

}  // namespace nvfp4::sm100

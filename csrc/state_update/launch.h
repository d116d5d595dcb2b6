// What the CUDA kernels of state_update take; ops/state_update/_cuda.py packs it.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

// Element (row, token, head, i) is data[row * row_stride + token * token_stride + head * head_stride + i].
struct InputLaunch {
    const void* data;
    i64 dtype;  // 0 fp32, 1 fp16, 2 bf16
    i64 row_stride, token_stride, head_stride;
};

struct StateUpdateLaunch {
    void* states;  // element (slot, head, i, j) is data[slot * slot_stride + head * head_stride + i * row_stride + j]
    i64 slot_stride, head_stride, row_stride;
    void* made;  // the state after each token, with strides likewise, or null: then `states` gets the last
    i64 made_row_stride, made_token_stride, made_head_stride, made_channel_stride;
    InputLaunch x, dt, B, C, z;  // z without data: no gate
    const float* A;              // [heads]
    const float* D;              // [heads], or [heads, head_dim], or null
    const float* dt_bias;        // [heads] or null
    const i64* indices;          // [batch], negative: none; or null
    const u64* noise;            // (seed, offset), or null
    void* y;                     // [batch, tokens, heads, head_dim] in x's dtype
    i64 tokens, heads, groups, head_dim, state, slots;
    i32 D_of_channels, dt_softplus;
    i32 wide, channel_blocks;  // wide: each row of a state begins at a multiple of 16 bytes, and ends at one
    float low, high;           // dt's limits
};

}  // namespace nvfp4

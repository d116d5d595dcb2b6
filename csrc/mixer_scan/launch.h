// What the CUDA kernels of mixer_scan take; ops/mixer_scan/_cuda.py packs it.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

// bf16, element i of a token, counted through all rows, is data[token * stride + i].
struct TokensLaunch {
    const u16* data;
    i64 stride;
};

struct MixerScanLaunch {
    TokensLaunch xBC, z, dt;     // tokens of xBC and z begin at multiples of 16 bytes
    const float* taps;           // [channels of xBC, 4]
    const float* bias;           // [channels of xBC] or null
    const float* A;              // [heads]
    const float* D;              // [heads]
    const float* dt_bias;        // [heads]
    const float* norm_weight;    // [heads, 64]
    const u16* conv_state;       // bf16 [sequences, channels of xBC, 3] or null
    const float* initial_state;  // [sequences, heads, 64, 128] or null
    const i64* cu_seqlens;       // [sequences + 1], or null: the rows are the sequences
    u16* y;                      // bf16 [rows, length, heads, 64]
    u16* conv_last;              // as conv_state
    float* last;                 // as initial_state
    i32 length, groups;
    float low, high;  // dt's limits
    float eps;
};

}  // namespace nvfp4

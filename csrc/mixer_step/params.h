// mixer_step: what lies between a Mamba-2 mixer's two projections, for the next tokens of sequences in slots: convolution with
// SiLU, state_update, gated norm. One call for three, since in decoding the calls cost more than their work.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

struct MixerStepParams {
    int dtype;  // of projected, windows and y: 0 fp32, 1 fp16, 2 bf16
    i64 batch, tokens, heads, groups, head_dim, state, slots;
    int width;              // of the convolution: 2, 3, 4
    const void* projected;  // [batch, tokens, z | x | B | C | dt], contiguous
    void* windows;          // [slots, channels, width - 1], the last inputs of the convolution, oldest first; in place
    void* states;           // [slots, heads, head_dim, state]; in place
    int state_dtype;
    const float* taps;       // [width, channels]; the last meets the current token
    const float* conv_bias;  // [channels] or null
    const float *A, *D, *dt_bias;  // [heads]
    const float* norm_weight;      // [heads * head_dim], normed over each group's part
    const i64* indices;            // [batch], the slot of each row, negative: none; null: slot b for row b
    float low, high, eps;          // dt's limits; the norm's
    void* y;                       // [batch, tokens, heads * head_dim]
    int threads;
};

// Return 0, 1 when memory ran out, or 2 for an index that is no slot: nothing has been written then.
namespace scalar { int mixer_step(const MixerStepParams&); }
namespace neon { int mixer_step(const MixerStepParams&); }
namespace avx2 { int mixer_step(const MixerStepParams&); }
namespace avx512 { int mixer_step(const MixerStepParams&); }

}  // namespace nvfp4

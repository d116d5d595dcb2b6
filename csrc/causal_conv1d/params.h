// causal_conv1d: y[t] = silu(bias + sum_k taps[k] x[t - width + 1 + k]), each channel and each sequence by itself.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

struct CausalConv1dParams {
    int dtype;  // of x, y, state, dy, dstate, dx: 0 fp32, 1 fp16, 2 bf16
    i64 tokens, channels, sequences;
    int width;          // 2, 3, 4
    bool silu;
    const i64* starts;  // [sequences + 1] from 0 to tokens; null: sequences of equal length
    const void* x;
    i64 x_row, x_token;  // strides in elements from sequence to sequence (not used with starts) and from token to token
    const float* taps;   // [width, channels]; the last meets the current token
    const float* bias;   // [channels] or null
    const void* initial;  // [sequences, channels, width - 1], the inputs before the first, oldest first; null: zeros
    int initial_dtype;
    void* y;              // forward: [tokens, channels]
    void* state;          // as initial, the inputs that the next token would meet
    const void* dy;       // backward
    i64 dy_row, dy_token;
    const void* dstate;   // gradient of state, or null
    void* dx;             // [tokens, channels]
    float* dtaps;          // [width + 1, channels]: of taps and, in the last row, of bias
    float* dinitial;       // [sequences, channels, width - 1], or null
    int threads;
};

// Status 2: starts do not ascend from 0 to tokens.
namespace scalar {
int causal_conv1d(const CausalConv1dParams&);
int causal_conv1d_backward(const CausalConv1dParams&);
}
namespace neon {
int causal_conv1d(const CausalConv1dParams&);
int causal_conv1d_backward(const CausalConv1dParams&);
}
namespace avx2 {
int causal_conv1d(const CausalConv1dParams&);
int causal_conv1d_backward(const CausalConv1dParams&);
}
namespace avx512 {
int causal_conv1d(const CausalConv1dParams&);
int causal_conv1d_backward(const CausalConv1dParams&);
}

}  // namespace nvfp4

// state_update: state <- exp(A dt) state + dt x B^T, y = (state C + D x) silu(z), token after token, each state in place.
#pragma once
#include "selective_scan/params.h"

namespace nvfp4 {

// Element (slot or batch row, token, head, i, j) is data[slot * slot_stride + token * token_stride + head * head_stride +
// i * row_stride + j]; the token's stride is 0 where there are none.
struct StateView {
    void* data;  // null: none
    i64 slot_stride, token_stride, head_stride, row_stride;
};

struct StateUpdateParams {
    i64 batch, tokens, heads, groups, head_dim, state;
    i64 slots;
    int state_dtype;  // of states and intermediate: 0 fp32, 1 fp16, 2 bf16
    StateView states, intermediate;  // with intermediate, which gets the state after each token, states are only read
    ScanView x, dt, B, C, z;         // rows are batch rows; z without data: no gate
    const float* A;                  // [heads]
    const float* D;                  // [heads], or [heads, head_dim] with D_of_channels; null: none
    bool D_of_channels;
    const float* dt_bias;  // [heads] or null
    const i64* indices;    // [batch], the slot of each row, negative: none; null: slot b for row b
    bool dt_softplus;
    float low, high;   // dt's limits
    bool stochastic;   // rounding of fp16 and bf16 states, token t with offset + t
    u64 seed, offset;
    void* y;           // [batch, tokens, heads, head_dim] in x's dtype
    int threads;
};

// Return 0, 1 when memory ran out, or 2 for an index that is no slot: nothing has been written then.
namespace scalar { int state_update(const StateUpdateParams&); }
namespace neon { int state_update(const StateUpdateParams&); }
namespace avx2 { int state_update(const StateUpdateParams&); }
namespace avx512 { int state_update(const StateUpdateParams&); }

}  // namespace nvfp4

// selective_scan: S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t, and the derivative of that.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

// Element (row, token, head, i) is data[row * row_stride + token * token_stride + head * head_stride + i].
struct ScanView {
    const void* data;
    int dtype;  // 0 fp32, 1 fp16, 2 bf16
    i64 row_stride, token_stride, head_stride;
};

// Tokens start .. start + length of a row are one sequence; `index` is the place of its states.
struct ScanSequence {
    i64 row, start, length, index;
};

struct ScanParams {
    ScanView x, dt, B, C;  // of dt, i is 0; of B and C, heads are groups
    const float* A;        // [heads]
    const float* D;        // [heads, head_dim] or null
    const float* dt_bias;  // [heads] or null
    const float* initial;  // [sequences, heads, head_dim, state] or null
    const ScanSequence* sequences;  // the longest first
    i64 count;                      // of sequences
    i64 rows, length, heads, groups, head_dim, state;
    bool dt_softplus;
    float low, high;  // dt's limits
    i64 chunk_size;
    void* y;      // [rows, length, heads, head_dim] in x's dtype
    float* last;  // [sequences, heads, head_dim, state]
    int threads;
};

// The outputs are contiguous, in the dtypes and shapes of what they are gradients of.
struct ScanBackwardParams {
    ScanParams scan;  // y and last aside
    ScanView dy;
    const float* dlast;  // as `last`, or null
    void *dx, *ddt, *dB, *dC;
    float* dA;        // [heads]
    float* dD;        // [heads, head_dim] or null
    float* ddt_bias;  // [heads]
    float* dinitial;  // as `initial`, or null
};

// Return 0, or 1 when memory ran out.
namespace scalar { int selective_scan(const ScanParams&); int selective_scan_backward(const ScanBackwardParams&); }
namespace neon { int selective_scan(const ScanParams&); int selective_scan_backward(const ScanBackwardParams&); }
namespace avx2 { int selective_scan(const ScanParams&); int selective_scan_backward(const ScanBackwardParams&); }
namespace avx512 { int selective_scan(const ScanParams&); int selective_scan_backward(const ScanBackwardParams&); }
namespace avx512bf16 { int selective_scan(const ScanParams&); int selective_scan_backward(const ScanBackwardParams&); }

}  // namespace nvfp4

// permute: token rows to rows sorted by expert. unpermute: the sum of each token's rows, weighted or not, and its derivatives.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

struct PermuteParams {
    const void* x;  // [tokens, features], of neighbouring features
    i64 row_stride;
    int dtype;      // of x, rows, out, dout and drows
    i64 tokens, top_k, features;
    const i64 *order, *inverse;  // slot of a sorted row, sorted row of a slot; a slot is token * top_k + choice
    const float* weights;        // [tokens, top_k] or null
    void* rows;                  // [tokens * top_k, features], contiguous: made by permute, read by unpermute and its backward
    void* out;                   // [tokens, features]
    const void* dout;            // as out
    void* drows;                 // as rows
    float* dweights;             // [tokens, top_k] or null
    int threads;
};

namespace scalar { int permute(const PermuteParams&); int unpermute(const PermuteParams&); int unpermute_backward(const PermuteParams&); }
namespace neon { int permute(const PermuteParams&); int unpermute(const PermuteParams&); int unpermute_backward(const PermuteParams&); }
namespace avx2 { int permute(const PermuteParams&); int unpermute(const PermuteParams&); int unpermute_backward(const PermuteParams&); }
namespace avx512 { int permute(const PermuteParams&); int unpermute(const PermuteParams&); int unpermute_backward(const PermuteParams&); }

}  // namespace nvfp4

// moe_step: a mixture-of-experts block at inference: y = shared_down relu2(shared_up x) + fc2 experts(fc1 x), the experts chosen and
// weighed by the router. One call for all, since in decoding the calls cost about as much as their work.
#pragma once
#include "matmul/params.h"

namespace nvfp4 {

struct MoeStepParams {
    Operand x;            // plain [tokens, hidden]
    const float* router;  // [experts, hidden], contiguous
    const float* bias;    // [experts] or null
    i64 experts, top_k, groups, top_groups;  // the last four as RouteParams has them
    float scale;
    bool normalize;
    Operand up, down;                // the first expert's [width, size] and [size, width]; size: latent's, or hidden
    i64 up_stride, down_stride;      // in values, to the next expert's
    Operand fc1, fc2;                // [size, hidden] and [hidden, size], or both without data: size is hidden
    Operand shared_up, shared_down;  // [shared, hidden] and [hidden, shared], or both without data: no shared expert
    void* out;                       // [tokens, hidden], of x's type
    int threads;
};

// Return 0, or 1 when memory ran out.
namespace scalar { int moe_step(const MoeStepParams&); }
namespace neon { int moe_step(const MoeStepParams&); }
namespace avx2 { int moe_step(const MoeStepParams&); }
namespace avx512 { int moe_step(const MoeStepParams&); }
namespace avx512bf16 { int moe_step(const MoeStepParams&); }

}  // namespace nvfp4

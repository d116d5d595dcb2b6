// router_logits: x weight^T with fp32 weights and sums; its derivatives.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

struct RouterLogitsParams {
    const void* x;        // [tokens, hidden]
    const float* weight;  // [experts, hidden], contiguous
    i64 tokens, hidden, experts;
    i64 stride;           // between x's rows
    int dtype;            // of x and dx
    float* logits;        // [tokens, experts], contiguous as all below
    const float* dlogits;
    void* dx;
    float* dweight;
    int threads;
};

namespace scalar { int router_logits(const RouterLogitsParams&); int router_logits_backward(const RouterLogitsParams&); }
namespace neon { int router_logits(const RouterLogitsParams&); int router_logits_backward(const RouterLogitsParams&); }
namespace avx2 { int router_logits(const RouterLogitsParams&); int router_logits_backward(const RouterLogitsParams&); }
namespace avx512 { int router_logits(const RouterLogitsParams&); int router_logits_backward(const RouterLogitsParams&); }

}  // namespace nvfp4

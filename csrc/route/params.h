// route: sigmoid scores, the top_k best of score + bias for each token, weights from the scores alone, and the slots in the order
// of their experts.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

struct RouteParams {
    const float* logits;  // [tokens, experts], contiguous
    const float* bias;    // [experts] or null
    i64 tokens, experts, top_k;
    i64 groups, top_groups;  // with groups > 1, only the top_groups best groups' experts may be chosen
    float scale;
    bool normalize;
    i64* indices;    // [tokens, top_k], best first
    float* weights;  // [tokens, top_k]
    i64* offsets;    // [experts + 1]
    i64* inverse;    // [tokens, top_k]
    i64* order;      // [tokens * top_k]
    int threads;
};

struct RouteBackwardParams {
    RouteParams forward;    // of which only the inputs are used
    const float* dweights;  // [tokens, top_k]
    float* dlogits;         // [tokens, experts]
};

// Return 0, or 1 when memory ran out.
namespace scalar { int route(const RouteParams&); int route_backward(const RouteBackwardParams&); }
namespace neon { int route(const RouteParams&); int route_backward(const RouteBackwardParams&); }
namespace avx2 { int route(const RouteParams&); int route_backward(const RouteBackwardParams&); }
namespace avx512 { int route(const RouteParams&); int route_backward(const RouteBackwardParams&); }

}  // namespace nvfp4

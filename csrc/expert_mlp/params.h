// expert_mlp: y[token] = sum over its choices c of w[token, c] down[e] relu2(up[e] x[token]), e = the expert of the choice.
// An inference step of a mixture of experts in one call.
#pragma once
#include "grouped_matmul/params.h"

namespace nvfp4 {

struct ExpertMlpParams {
    GroupedMatmulParams up, down;  // up.a: plain tokens [tokens, size], as its rows [tokens * top_k] by `token`
    i64 top_k;
    i64* token;            // room for [tokens * top_k]: the token of each row
    const float* weights;  // [tokens, top_k]
    const i64* inverse;    // [tokens, top_k]: the row of each slot among those sorted by expert
    const i64* order;      // [tokens * top_k]: the slot of each such row
    void* out;             // [tokens, size], of x's type
    int threads;
};

// Return 0, 1 when memory ran out, or 2 when the routing is none.
namespace scalar { int expert_mlp(const ExpertMlpParams&); }
namespace neon { int expert_mlp(const ExpertMlpParams&); }
namespace avx2 { int expert_mlp(const ExpertMlpParams&); }
namespace avx512 { int expert_mlp(const ExpertMlpParams&); }
namespace avx512bf16 { int expert_mlp(const ExpertMlpParams&); }

}  // namespace nvfp4

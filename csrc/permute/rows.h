// Rows gathered by slot and summed by token, for permute and expert_mlp.
#pragma once
#include <cstring>

#include "cpu/runs.h"
#include "cpu/threads.h"

namespace nvfp4 {
namespace NVFP4_ISA {

// Whether the indices lie within the rows: they come from the caller.
static inline bool within(const i64* indices, i64 count) {
    bool all = true;
    for (i64 i = 0; i < count; ++i) all = all && indices[i] >= 0 && indices[i] < count;
    return all;
}

static inline int threads_for_rows(i64 values, int threads) {
    const i64 most = values / 65536 + 1;
    return static_cast<int>(threads < most ? threads : most);
}

static inline void gather_row(const char* x, i64 stride_bytes, i64 token, void* to, i64 bytes) {
    std::memcpy(to, x + token * stride_bytes, static_cast<size_t>(bytes));
}

// out = sum over c of weights[c] * rows[inverse[c]], c ascending; weights null: all one.
template <class From, class To>
static inline void sum_slots(const From* rows, const i64* inverse, const float* weights, i64 top_k, i64 features, To* out) {
    over(features, [&](i64 i, int, auto extent) {
        F sum = F(0.0f);
        for (i64 c = 0; c < top_k; ++c) {
            const F row = load(rows + inverse[c] * features + i, extent);
            sum = weights ? fma(F(weights[c]), row, sum) : sum + row;
        }
        store(out + i, sum, extent);
    });
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

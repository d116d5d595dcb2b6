// expert_mlp on the CPU: two grouped products, the first one of gathered rows and with the squared ReLU in its last step, weighted
// sums.
#include "params.h"

#include <type_traits>

#include "permute/rows.h"

namespace nvfp4 {
namespace NVFP4_ISA {

int expert_mlp(const ExpertMlpParams& p) {
    const DefaultFloats floats;
    const i64 rows = p.up.a.rows, size = p.up.a.cols, tokens = rows / p.top_k;
    if (!within(p.order, rows) || !within(p.inverse, rows)) return 2;
    for (i64 row = 0; row < rows; ++row) p.token[row] = p.order[row] / p.top_k;
    const int up = grouped_matmul(p.up), status = up ? up : grouped_matmul(p.down);
    if (status) return status;
    auto combine = [&](int t, int n) {
        const Range mine = part(tokens, 1, t, n);
        with_dtype(static_cast<int>(p.up.a.kind), [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            for (i64 token = mine.begin; token < mine.end; ++token) {
                const i64 slot = token * p.top_k;
                sum_slots(static_cast<const Single*>(p.down.out), p.inverse + slot, p.weights + slot, p.top_k, size,
                          static_cast<T*>(p.out) + token * size);
            }
        });
    };
    parallel(threads_for_rows(rows * size, p.threads), combine);
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// expert_mlp on the CPU: gather, two grouped products with the squared ReLU in the first one's last step, weighted sums.
#include "params.h"

#include <type_traits>

#include "permute/rows.h"

namespace nvfp4 {
namespace NVFP4_ISA {

int expert_mlp(const ExpertMlpParams& p) {
    const DefaultFloats floats;
    const i64 rows = p.x.rows * p.top_k, size = p.x.cols, bytes = p.x.kind == Kind::fp32 ? 4 : 2;
    if (!within(p.order, rows) || !within(p.inverse, rows)) return 2;
    const int threads = threads_for_rows(rows * size, p.threads);
    auto gather = [&](int t, int n) {
        const Range mine = part(rows, 1, t, n);
        char* to = static_cast<char*>(const_cast<void*>(p.up.a.data));
        for (i64 row = mine.begin; row < mine.end; ++row) {
            gather_row(static_cast<const char*>(p.x.data), p.x.row_stride * bytes, p.order[row] / p.top_k, to + row * size * bytes,
                       size * bytes);
        }
    };
    parallel(threads, gather);
    const int up = grouped_matmul(p.up), status = up ? up : grouped_matmul(p.down);
    if (status) return status;
    auto combine = [&](int t, int n) {
        const Range tokens = part(p.x.rows, 1, t, n);
        with_dtype(static_cast<int>(p.x.kind), [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            for (i64 token = tokens.begin; token < tokens.end; ++token) {
                const i64 slot = token * p.top_k;
                sum_slots(static_cast<const Single*>(p.down.out), p.inverse + slot, p.weights + slot, p.top_k, size,
                          static_cast<T*>(p.out) + token * size);
            }
        });
    };
    parallel(threads, combine);
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

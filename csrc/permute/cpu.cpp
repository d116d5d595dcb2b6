// permute and unpermute on the CPU: bound by memory, each row read and written once. Nothing is ever scattered, since the
// permutation is known both ways, and a token's rows are summed in the order of its choices.
#include "params.h"

#include <type_traits>

#include "rows.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

// With w the weight of the row's slot: drow = w dout[token], dw = <dout[token], row>.
template <class T>
void slot_backward(const PermuteParams& p, i64 row) {
    const i64 slot = p.order[row], token = slot / p.top_k;
    const T* dout = static_cast<const T*>(p.dout) + token * p.features;
    const T* y = static_cast<const T*>(p.rows) + row * p.features;
    T* dy = static_cast<T*>(p.drows) + row * p.features;
    const F weight = F(p.weights[slot]);
    F dots[sums] = {F(0.0f), F(0.0f), F(0.0f), F(0.0f)};
    over(p.features, [&](i64 i, int k, auto extent) {
        const F d = load(dout + i, extent);
        dots[k] = fma(d, load(y + i, extent), dots[k]);
        store(dy + i, d * weight, extent);
    });
    p.dweights[slot] = total(dots);
}

template <class Body>
void over_rows(const PermuteParams& p, i64 count, const Body& each) {
    auto body = [&](int t, int n) {
        const Range rows = part(count, 1, t, n);
        with_dtype(p.dtype, [&](auto* type) {
            for (i64 row = rows.begin; row < rows.end; ++row) each(row, type);
        });
    };
    parallel(threads_for_rows(p.tokens * p.top_k * p.features, p.threads), body);
}

}  // namespace

int permute(const PermuteParams& p) {
    const i64 rows = p.tokens * p.top_k, bytes = p.dtype == fp32 ? 4 : 2;
    if (!within(p.order, rows)) return 2;
    over_rows(p, rows, [&](i64 row, auto*) {
        char* to = static_cast<char*>(p.rows) + row * p.features * bytes;
        gather_row(static_cast<const char*>(p.x), p.row_stride * bytes, p.order[row] / p.top_k, to, p.features * bytes);
    });
    return 0;
}

int unpermute(const PermuteParams& p) {
    if (!within(p.inverse, p.tokens * p.top_k)) return 2;
    over_rows(p, p.tokens, [&](i64 token, auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const i64 slot = token * p.top_k;
        sum_slots(static_cast<const T*>(p.rows), p.inverse + slot, p.weights ? p.weights + slot : nullptr, p.top_k, p.features,
                  static_cast<T*>(p.out) + token * p.features);
    });
    return 0;
}

int unpermute_backward(const PermuteParams& p) {
    if (!within(p.order, p.tokens * p.top_k)) return 2;
    over_rows(p, p.tokens * p.top_k, [&](i64 row, auto* type) { slot_backward<std::remove_pointer_t<decltype(type)>>(p, row); });
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// relu2 on the CPU: bound by memory, x read and y written once; backward x and dy read, dx written once.
#include "params.h"

#include <type_traits>

#include "cpu/runs.h"
#include "cpu/threads.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

// NaN is the second operand of greatest, and so stays.
template <class T>
void forward_row(const Relu2Params& p, i64 row) {
    const T* x = static_cast<const T*>(p.x) + row * p.features;
    T* y = static_cast<T*>(p.y) + row * p.features;
    const F weight = F(p.weights ? p.weights[row] : 1.0f);
    over(p.features, [&](i64 i, int, auto extent) {
        const F r = greatest(F(0.0f), load(x + i, extent));
        store(y + i, r * r * weight, extent);
    });
}

// dx = 2 r weight dy, dweight = <r^2, dy>, r = max(x, 0).
template <class T>
void backward_row(const Relu2Params& p, i64 row) {
    const T* x = static_cast<const T*>(p.x) + row * p.features;
    const T* dy = static_cast<const T*>(p.dy) + row * p.features;
    T* dx = static_cast<T*>(p.dx) + row * p.features;
    const F twice = F(2.0f * (p.weights ? p.weights[row] : 1.0f));
    F dots[sums] = {F(0.0f), F(0.0f), F(0.0f), F(0.0f)};
    over(p.features, [&](i64 i, int k, auto extent) {
        const F r = greatest(F(0.0f), load(x + i, extent)), d = load(dy + i, extent) * r;
        dots[k] = fma(d, r, dots[k]);
        store(dx + i, d * twice, extent);
    });
    if (p.dweights) p.dweights[row] = total(dots);
}

template <class Body>
void over_rows(const Relu2Params& p, const Body& each) {
    const i64 most = p.rows * p.features / 65536 + 1;
    auto body = [&](int t, int n) {
        const Range rows = part(p.rows, 1, t, n);
        with_dtype(p.dtype, [&](auto* type) {
            for (i64 row = rows.begin; row < rows.end; ++row) each(row, type);
        });
    };
    parallel(static_cast<int>(p.threads < most ? p.threads : most), body);
}

}  // namespace

int relu2(const Relu2Params& p) {
    const DefaultFloats floats;
    over_rows(p, [&](i64 row, auto* type) { forward_row<std::remove_pointer_t<decltype(type)>>(p, row); });
    return 0;
}

int relu2_backward(const Relu2Params& p) {
    const DefaultFloats floats;
    over_rows(p, [&](i64 row, auto* type) { backward_row<std::remove_pointer_t<decltype(type)>>(p, row); });
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

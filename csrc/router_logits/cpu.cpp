// router_logits on the CPU: three products with one narrow side, in tiles of 4 x 4 vectors of sums. Each sum has an order of its
// own, so that a token's logits depend on neither its company nor the threads.
#include "params.h"

#include <type_traits>

#include "cpu/runs.h"
#include "cpu/threads.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

constexpr int side = 4;
constexpr i64 panel = 32;      // tokens whose rows stay near while the weights pass by
constexpr i64 token_run = 256;  // tokens whose products are summed before they are added to dweight

template <int n>
using Count = std::integral_constant<int, n>;

// f(i, Count<side>) for whole runs of [begin, end), f(i, Count<1>) for the rest.
template <class Function>
void in_runs(i64 begin, i64 end, const Function& f) {
    for (; begin + side <= end; begin += side) f(begin, Count<side>{});
    for (; begin < end; ++begin) f(begin, Count<1>{});
}

// f(i, Count<vectors>, extent) for the vectors of [begin, end).
template <class Function>
void in_vectors(i64 begin, i64 end, const Function& f) {
    constexpr int lanes = F::lanes;
    for (; begin + side * lanes <= end; begin += side * lanes) f(begin, Count<side>{}, Whole{});
    for (; begin + lanes <= end; begin += lanes) f(begin, Count<1>{}, Whole{});
    if (begin < end) f(begin, Count<1>{}, Part{static_cast<int>(end - begin)});
}

template <int rows, int cols>
void clear(F (&sums)[rows][cols]) {
    NVFP4_UNROLL
    for (int r = 0; r < rows; ++r)
        NVFP4_UNROLL
        for (int c = 0; c < cols; ++c) sums[r][c] = F(0.0f);
}

template <class T>
void logits_of(const RouterLogitsParams& p, Range tokens, Range experts) {
    const T* x = static_cast<const T*>(p.x);
    auto tile = [&](i64 t, auto row_count, i64 e, auto col_count) {
        constexpr int rows = decltype(row_count)::value, cols = decltype(col_count)::value;
        F sums[rows][cols];
        clear(sums);
        auto step = [&](i64 k, auto extent) {
            F w[cols];
            NVFP4_UNROLL
            for (int c = 0; c < cols; ++c) w[c] = load(p.weight + (e + c) * p.hidden + k, extent);
            NVFP4_UNROLL
            for (int r = 0; r < rows; ++r) {
                const F value = load(x + (t + r) * p.stride + k, extent);
                NVFP4_UNROLL
                for (int c = 0; c < cols; ++c) sums[r][c] = fma(value, w[c], sums[r][c]);
            }
        };
        i64 k = 0;
        for (; k + F::lanes <= p.hidden; k += F::lanes) step(k, Whole{});
        if (k < p.hidden) step(k, Part{static_cast<int>(p.hidden - k)});
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < cols; ++c) p.logits[(t + r) * p.experts + e + c] = sum(sums[r][c]);
    };
    for (i64 t = tokens.begin; t < tokens.end; t += panel) {
        const i64 end = t + panel < tokens.end ? t + panel : tokens.end;
        in_runs(experts.begin, experts.end, [&](i64 e, auto cols) {
            in_runs(t, end, [&](i64 token, auto rows) { tile(token, rows, e, cols); });
        });
    }
}

template <class T>
void input_gradient(const RouterLogitsParams& p, Range tokens) {
    T* dx = static_cast<T*>(p.dx);
    auto tile = [&](i64 t, auto row_count, i64 k, auto vector_count, auto extent) {
        constexpr int rows = decltype(row_count)::value, vectors = decltype(vector_count)::value;
        F sums[rows][vectors];
        clear(sums);
        for (i64 e = 0; e < p.experts; ++e) {
            F w[vectors];
            NVFP4_UNROLL
            for (int v = 0; v < vectors; ++v) w[v] = load(p.weight + e * p.hidden + k + v * F::lanes, extent);
            NVFP4_UNROLL
            for (int r = 0; r < rows; ++r) {
                const F slope = F(p.dlogits[(t + r) * p.experts + e]);
                NVFP4_UNROLL
                for (int v = 0; v < vectors; ++v) sums[r][v] = fma(slope, w[v], sums[r][v]);
            }
        }
        NVFP4_UNROLL
        for (int r = 0; r < rows; ++r)
            NVFP4_UNROLL
            for (int v = 0; v < vectors; ++v) store(dx + (t + r) * p.hidden + k + v * F::lanes, sums[r][v], extent);
    };
    for (i64 t = tokens.begin; t < tokens.end; t += panel) {
        const i64 end = t + panel < tokens.end ? t + panel : tokens.end;
        in_vectors(0, p.hidden, [&](i64 k, auto vectors, auto extent) {
            in_runs(t, end, [&](i64 token, auto rows) { tile(token, rows, k, vectors, extent); });
        });
    }
}

template <class T>
void weight_gradient(const RouterLogitsParams& p, Range columns) {
    const T* x = static_cast<const T*>(p.x);
    auto tile = [&](i64 begin, i64 end, i64 e, auto row_count, i64 k, auto vector_count, auto extent) {
        constexpr int rows = decltype(row_count)::value, vectors = decltype(vector_count)::value;
        F sums[rows][vectors];
        clear(sums);
        for (i64 t = begin; t < end; ++t) {
            F value[vectors];
            NVFP4_UNROLL
            for (int v = 0; v < vectors; ++v) value[v] = load(x + t * p.stride + k + v * F::lanes, extent);
            NVFP4_UNROLL
            for (int r = 0; r < rows; ++r) {
                const F slope = F(p.dlogits[t * p.experts + e + r]);
                NVFP4_UNROLL
                for (int v = 0; v < vectors; ++v) sums[r][v] = fma(slope, value[v], sums[r][v]);
            }
        }
        NVFP4_UNROLL
        for (int r = 0; r < rows; ++r)
            NVFP4_UNROLL
            for (int v = 0; v < vectors; ++v) {
                float* at = p.dweight + (e + r) * p.hidden + k + v * F::lanes;
                store(at, begin ? load(at, extent) + sums[r][v] : sums[r][v], extent);
            }
    };
    i64 begin = 0;
    do {  // once without tokens: the gradient is zero
        const i64 end = begin + token_run < p.tokens ? begin + token_run : p.tokens;
        in_vectors(columns.begin, columns.end, [&](i64 k, auto vectors, auto extent) {
            in_runs(0, p.experts, [&](i64 e, auto rows) { tile(begin, end, e, rows, k, vectors, extent); });
        });
        begin = end;
    } while (begin < p.tokens);
}

template <class Function>
void on_threads(const RouterLogitsParams& p, const Function& f) {
    const i64 most = p.tokens * p.experts * p.hidden / 65536 + 1;
    auto body = [&](int t, int n) {
        with_dtype(p.dtype, [&](auto* type) { f(t, n, type); });
    };
    parallel(static_cast<int>(p.threads < most ? p.threads : most), body);
}

}  // namespace

int router_logits(const RouterLogitsParams& p) {
    const DefaultFloats floats;
    on_threads(p, [&](int t, int n, auto type) {
        const bool few = p.tokens < side * n;
        const Range tokens = few ? Range{0, p.tokens} : part(p.tokens, side, t, n);
        const Range experts = few ? part(p.experts, side, t, n) : Range{0, p.experts};
        logits_of<std::remove_pointer_t<decltype(type)>>(p, tokens, experts);
    });
    return 0;
}

int router_logits_backward(const RouterLogitsParams& p) {
    const DefaultFloats floats;
    on_threads(p, [&](int t, int n, auto type) {
        input_gradient<std::remove_pointer_t<decltype(type)>>(p, part(p.tokens, side, t, n));
        weight_gradient<std::remove_pointer_t<decltype(type)>>(p, part(p.hidden, side * F::lanes, t, n));
    });
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

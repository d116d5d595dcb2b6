// y and the last states of some heads, span after span.
#pragma once
#include "state.h"

namespace nvfp4 {
namespace NVFP4_ISA {

template <class P>
struct ForwardBuffers {
    using Step = typename P::Step;
    float *rows, *scores, *x, *skip, *states;
    Step *C, *B_turned, *B_paired, *mixed, *x_paired, *x_onto, *states_paired;

    ForwardBuffers(Pieces& from, const Padded<P>& size, i64 heads) {
        rows = from.take<float>(span * size.n);
        scores = from.take<float>(span * span);
        x = from.take<float>(span * size.p);
        skip = from.take<float>(size.p);
        states = from.take<float>(heads * size.state);
        C = from.take<Step>(span * size.n);
        B_turned = from.take<Step>(span * size.n);
        B_paired = from.take<Step>(span * size.n);
        mixed = from.take<Step>(span * span);
        x_paired = from.take<Step>(span * size.p);
        x_onto = from.take<Step>(span * size.p);
        states_paired = from.take<Step>(P::values == 1 ? 0 : heads * size.state);
    }
};

// mixed[i][j] = scores[i][j] exp(a_i - a_j) dt_j for j <= i, else 0.
template <class P>
static inline void mix(const Decays& decays, const float* scores, i64 count, typename P::Step* mixed) {
    F row[span_vectors], out[span_vectors];
    for (int v = 0; v < span_vectors; ++v) row[v] = F(0.0f);
    for (i64 i = 0; i < count; ++i) {
        next_row(decays.step, decays.each[i], i, row);
        for (int v = 0; v < span_vectors; ++v) {
            out[v] = until(load(scores + i * span + v * F::lanes) * row[v], v * F::lanes, i);
        }
        store_kept32<P>(out, mixed + i * (span / P::values));
    }
}

// y_i = exp(a_i) C_i S + sum_j mixed[i][j] x_j + D x_i, for the rows of one head.
template <class P>
static inline void write_outputs(const ScanParams& p, const ForwardBuffers<P>& b, const Padded<P>& size, const Decays& decays,
                                 const typename P::Step* state, const typename P::Step* x, i64 count, i64 token, i64 head) {
    const i64 n = size.n / P::values, stride = p.heads * p.head_dim;
    const i64 start = token * stride + head * p.head_dim;
    each_tile(ceil_to(count, tile_rows), size.p, [&](i64 row, i64 col, auto vectors) {
        constexpr i64 width = vectors * F::lanes;
        auto sums = Sums<vectors>::zero();
        add_products<P>(sums, Left<P>{b.C + row * n, n, 1}, Right<P>{state + col * n, width}, n);
        sums.scale_rows(decays.into + row);
        add_products_before<P>(sums, Left<P>{b.mixed + row * (span / P::values), span / P::values, 1},
                               Right<P>{x + col * (span / P::values), width}, row);
        write_tile<P>(sums, p.x.dtype, p.y, start + row * stride + col, stride, at_most(tile_rows, count - row), p.head_dim - col,
                   b.skip + col, b.x + col * span + row * width);
    });
}

// False when memory ran out.
template <class P>
static inline bool forward(const ScanParams& p, const Work& work) {
    static thread_local Scratch scratch;
    const Padded<P> size(p);
    Pieces needed(nullptr);
    ForwardBuffers<P>(needed, size, work.heads);
    void* memory = scratch.get(needed.used);
    if (!memory) return false;
    Pieces pieces(memory);
    const ForwardBuffers<P> b(pieces, size, work.heads);

    const i64 n = size.n / P::values;
    read_initial(p, work, p.initial, size, b.states);
    if constexpr (P::values > 1) {
        for (i64 h = 0; h < work.heads; ++h) {
            paired<P>(b.states + h * size.state, size.n, size.n, size.p, panel, nullptr, b.states_paired + h * size.state / P::values);
        }
    }
    const Spans spans(work.sequence->length, p.chunk_size);
    for (i64 k = 0; k < spans.count(); ++k) {
        const Span s = spans[k];
        read_view(p.C, work, s, work.group, p.state, size.n, size.n, b.rows);
        store_kept<P>(b.rows, span * size.n, b.C);
        read_view(p.B, work, s, work.group, p.state, size.n, size.n, b.rows);
        turn(kept<P>(b.rows, span * size.n, b.B_paired), span, n, n, b.B_turned);
        const auto* B = paired<P>(b.rows, span, span, size.n, size.n, nullptr, b.B_paired);
        score<P>(b.C, b.B_turned, ceil_to(s.count, tile_rows), n, n, b.scores);
        for (i64 h = 0; h < work.heads; ++h) {
            const i64 head = work.first + h;
            float* state = b.states + h * size.state;
            typename P::Step* narrow = b.states_paired + h * size.state / P::values;
            Decays decays;
            decays.read(p, work, s, head);
            mix<P>(decays, b.scores, s.count, b.mixed);
            read_view(p.x, work, s, head, p.head_dim, size.p, panel, b.x);
            if (h + 1 < work.heads) {
                prefetch_view(p.x, work, s, head + 1, p.head_dim);
            } else if (k + 1 < spans.count()) {
                prefetch_view(p.x, work, spans[k + 1], work.first, p.head_dim);
            }
            read_skip(p, head, size.p, b.skip);
            const auto* x = paired<P>(b.x, span, span, size.p, panel, nullptr, b.x_paired);
            write_outputs<P>(p, b, size, decays, either<P>(state, narrow), x, s.count, token_number(p, work, s), head);
            x = paired<P>(b.x, span, span, size.p, panel, decays.onto, b.x_onto);
            pass_on<P>(state, state, decays.through, B, x, s.count, size.n, size.p, nullptr, narrow);
        }
    }
    write_last(p, work, b.states, size, p.last);
    return true;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// States, [state][head_dim] in panels while the products use them: read, written, and passed on over a span.
#pragma once
#include "cpu/tile.h"
#include "span.h"

namespace nvfp4 {
namespace NVFP4_ISA {

// Rounded up so that every form has whole vectors.
template <class P>
struct Padded {
    i64 n, p, state;
    explicit Padded(const ScanParams& s)
        : n(ceil_to(s.state, 16 * P::values)), p(ceil_to(s.head_dim, 16 * P::values)), state(n * p) {}
};

// A state [head_dim, state] of the tensors to the form the products use, [padded state][padded head_dim] in panels; and back.
static inline void read_state(const float* from, i64 head_dim, i64 state, i64 p, i64 n, float* to) {
    const Matrix matrix{from, fp32, head_dim, state, state, 1};
    Tile tile;
    for (i64 c = 0; c < p; c += 16) {
        const i64 start = c / panel * panel, w = at_most(panel, p - start);
        for (i64 r = 0; r < n; r += 16) {
            load_tile<Single>(matrix, c, r, tile);
            transpose16(tile.v[0], 16, to + start * n + r * w + (c - start), w);
        }
    }
}

static inline void write_state(const float* from, i64 head_dim, i64 state, i64 p, i64 n, float* to) {
    Tile tile;
    for (i64 c = 0; c < head_dim; c += 16) {
        const i64 start = c / panel * panel, w = at_most(panel, p - start);
        for (i64 r = 0; r < state; r += 16) {
            transpose16(from + start * n + r * w + (c - start), w, tile.v[0], 16);
            for (i64 i = 0; i < at_most(16, head_dim - c); ++i) {
                F row[vectors16];
                for (int v = 0; v < vectors16; ++v) row[v] = load(tile.v[i] + v * F::lanes);
                store_some(row, reinterpret_cast<Single*>(to + (c + i) * state + r), static_cast<int>(at_most(16, state - r)));
            }
        }
    }
}

// The states before the first token.
template <class P>
static inline void read_initial(const ScanParams& p, const Work& work, const float* from, const Padded<P>& size, float* to) {
    const i64 stored = p.head_dim * p.state;
    for (i64 h = 0; h < work.heads; ++h, to += size.state) {
        if (from) {
            read_state(from + (work.sequence->index * p.heads + work.first + h) * stored, p.head_dim, p.state, size.p, size.n, to);
        } else {
            __builtin_memset(to, 0, static_cast<size_t>(size.state) * 4);
        }
    }
}

template <class P>
static inline void write_last(const ScanParams& p, const Work& work, const float* from, const Padded<P>& size, float* to) {
    const i64 stored = p.head_dim * p.state;
    to += (work.sequence->index * p.heads + work.first) * stored;
    for (i64 h = 0; h < work.heads; ++h) {
        write_state(from + h * size.state, p.head_dim, p.state, size.p, size.n, to + h * stored);
    }
}

// to = through * from + (tokens of `left`)^T (tokens of `right`), states of n rows and p columns; left and right paired. With
// steps of bf16 also the kept and paired forms of the result, where wanted.
template <class P>
static inline void pass_on(const float* from, float* to, float through, const typename P::Step* left,
                           const typename P::Step* right, i64 count, i64 n, i64 p, typename P::Step* kept,
                           typename P::Step* paired) {
    each_tile(n, p, [&](i64 row, i64 col, auto vectors) {
        constexpr i64 width = vectors * F::lanes;
        const i64 at = col * n + row * width;
        Sums<vectors> sums;
        for (int r = 0; r < tile_rows; ++r) {
            for (int v = 0; v < vectors; ++v) sums.v[r][v] = load(from + at + r * width + v * F::lanes) * F(through);
        }
        add_products<P>(sums, Left<P>{left + row, 1, n}, Right<P>{right + col * (span / P::values), width},
                        (count + P::values - 1) / P::values);
        for (int r = 0; r < tile_rows; ++r) {
            for (int v = 0; v < vectors; ++v) store(to + at + r * width + v * F::lanes, sums.v[r][v]);
        }
        if constexpr (P::values == 2 && vectors == 2) {
            for (int r = 0; kept && r < tile_rows; ++r) store_kept32<P>(sums.v[r], kept + (at + r * width) / 2);
            for (int r = 0; paired && r < tile_rows; r += 2) {
                for (int v = 0; v < 2; ++v) store(paired + (at + r * width) / 2 + v * F::lanes, P::pair(sums.v[r][v], sums.v[r + 1][v]));
            }
        }
    });
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

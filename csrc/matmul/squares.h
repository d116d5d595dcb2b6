// The last step of grouped_relu2's products: forward relu2 of the rounded values beside them, backward its derivative.
#pragma once
#include <type_traits>

#include "cpu/simd.h"
#include "cpu/steps.h"
#include "cpu/threads.h"
#include "cpu/tile.h"
#include "params.h"

namespace nvfp4 {
namespace NVFP4_ISA {

// The values as T holds them.
template <class T>
static inline void round16(const F* x, F* rounded) {
    T run[16];
    for (int i = 0; i < vectors16; ++i) store(run + i * F::lanes, x[i]);
    for (int i = 0; i < vectors16; ++i) rounded[i] = load(run + i * F::lanes);
}

// The first `count` of sixteen values, zero in the place of the others.
static inline void keep_some(F* x, int count) {
    alignas(64) float run[16];
    for (int i = 0; i < vectors16; ++i) store(run + i * F::lanes, x[i]);
    for (int i = count; i < 16; ++i) run[i] = 0.0f;
    for (int i = 0; i < vectors16; ++i) x[i] = load(run + i * F::lanes);
}

// `width` sums y from column `col` of a row of n on: backward they become dh.
template <class T>
static inline void square(const Squares& s, i64 row, i64 col, i64 n, int width, F* y) {
    const i64 at = row * n + col;
    const float weight = s.weights ? s.weights[row] : 1.0f;
    F h[vectors16], made[vectors16], dot = F(0.0f);
    if (width < 16) keep_some(y, width);
    if (s.h) {
        alignas(64) float wide[16];
        widen_some(static_cast<const T*>(s.h) + at, 1, width, wide);
        for (int i = 0; i < vectors16; ++i) h[i] = load(wide + i * F::lanes);
    } else {
        round16<T>(y, h);
    }
    for (int i = 0; i < vectors16; ++i) {
        const F r = greatest(F(0.0f), h[i]);  // NaN stays
        made[i] = r * r * F(weight);
        if (s.h) {
            const F d = y[i] * r;
            dot = fma(d, r, dot);
            y[i] = d * F(2.0f * weight);
        }
    }
    if (s.made) store_some(made, static_cast<T*>(s.made) + at, width);
    if (s.sums) s.sums[row * ((n + 15) / 16) + col / 16] = sum(dot);
    if (s.amax) {
        F rounded[vectors16];
        round16<T>(s.h ? y : made, rounded);
        for (int i = 0; i < vectors16; ++i) {  // as integers, of which NaN is the largest
            const U before = load(s.amax + i * F::lanes), now = bits(magnitude(rounded[i]));
            store(s.amax + i * F::lanes, select(less_int(before, now), now, before));
        }
    }
}

// The largest magnitudes of the transform, if wanted, of part of what is made: rows from a multiple of 16 to one, or to the last.
static inline void turn(const MatmulParams& p, Range rows, Range cols) {
    if (!p.squares || !p.squares->turned) return;
    const Squares& s = *p.squares;
    const Matrix x{s.h ? p.out : s.made, p.out_dtype, p.a.rows, p.b.rows, p.b.rows, 1};
    with_dtype(x.dtype, [&](auto* type) {
        Tile t;
        for (i64 row = rows.begin; row < rows.end; row += 16) {
            for (i64 col = cols.begin; col < cols.end; col += 16) {
                load_tile<std::remove_pointer_t<decltype(type)>>(x, row, col, t);
                rotate_tile(t, s.signs, t);
                add_block_amax(t, s.turned);
            }
        }
    });
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

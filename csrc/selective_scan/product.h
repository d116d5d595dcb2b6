// The matrix products: tiles of sums in registers, each element summed over k in order by multiply-adds, whatever the tile.
#pragma once
#include <type_traits>

#include "cpu/steps.h"

namespace nvfp4 {
namespace NVFP4_ISA {

// A tile is tile_rows x panel. Wide enough to hide the latency of the multiply-add, low enough that its steps of the right
// operand (`panel` floats wide, 128 long: 16 KiB) stay in the first-level cache while the rows of tiles pass by.
#if defined(NVFP4_ISA_AVX512)
constexpr i64 tile_rows = 8, panel = 32;
#elif defined(NVFP4_ISA_AVX2) || defined(NVFP4_ISA_NEON)
constexpr i64 tile_rows = 4, panel = 16;
#else
constexpr i64 tile_rows = 2, panel = 16;
#endif

static inline i64 ceil_to(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }
static inline i64 at_most(i64 a, i64 b) { return a < b ? a : b; }

// Calls body(row, col, vectors) for every tile of rows x cols, both multiples of what a tile has, or cols of 16.
template <class Body>
NVFP4_INLINE void each_tile(i64 rows, i64 cols, Body body) {
    i64 col = 0;
    for (; col + panel <= cols; col += panel) {
        for (i64 row = 0; row < rows; row += tile_rows) body(row, col, std::integral_constant<int, panel / F::lanes>());
    }
    if constexpr (panel > 16) {
        if (col == cols) return;
        for (i64 row = 0; row < rows; row += tile_rows) body(row, col, std::integral_constant<int, 16 / F::lanes>());
    }
}

// The tiles of a square that touch its lower triangle, sixteen columns of them where that is enough.
template <class Body>
NVFP4_INLINE void each_lower_tile(i64 rows, Body body) {
    for (i64 row = 0; row < rows; row += tile_rows) {
        for (i64 col = 0; col < row + tile_rows; col += panel) {
            if (panel > 16 && col + 16 >= row + tile_rows) {
                body(row, col, std::integral_constant<int, 16 / F::lanes>());
            } else {
                body(row, col, std::integral_constant<int, panel / F::lanes>());
            }
        }
    }
}

// Step s of row r: at[r * row + s * step].
template <class P>
struct Left {
    const typename P::Step* at;
    i64 row, step;
};

// Step s of the tile's columns: at[s * step ...].
template <class P>
struct Right {
    const typename P::Step* at;
    i64 step;
};

template <int vectors>
struct Sums {
    F v[tile_rows][vectors];

    NVFP4_INLINE Sums zero() {
        Sums sums;
        for (int r = 0; r < tile_rows; ++r) {
            for (int v = 0; v < vectors; ++v) sums.v[r][v] = F(0.0f);
        }
        return sums;
    }
    __attribute__((always_inline)) void scale_rows(const float* factors) {
        for (int r = 0; r < tile_rows; ++r) {
            for (int v = 0; v < vectors; ++v) this->v[r][v] = this->v[r][v] * F(factors[r]);
        }
    }
};

template <class P, int vectors>
NVFP4_INLINE void add_products(Sums<vectors>& sums, Left<P> a, Right<P> b, i64 steps) {
    for (i64 s = 0; s < steps; ++s) {
        decltype(load(b.at)) right[vectors];
        for (int v = 0; v < vectors; ++v) right[v] = load(b.at + s * b.step + v * F::lanes);
        for (int r = 0; r < tile_rows; ++r) {
            const auto left = broadcast(a.at[r * a.row + s * a.step]);
            for (int v = 0; v < vectors; ++v) sums.v[r][v] = dot(sums.v[r][v], left, right[v]);
        }
    }
}

// The same where row r of the tile, being row `row` + r of all, takes the values 0 .. row + r of k alone: those beyond are
// not read as zeros but not read at all, so that not even an Inf among them can be felt.
template <class P, int vectors>
NVFP4_INLINE void add_products_before(Sums<vectors>& sums, Left<P> a, Right<P> b, i64 row) {
    const i64 whole = row / P::values;
    add_products<P>(sums, a, b, whole);
    NVFP4_UNROLL
    for (int s = 0; s < tile_rows / P::values; ++s) {
        decltype(load(b.at)) right[vectors];
        for (int v = 0; v < vectors; ++v) right[v] = load(b.at + (whole + s) * b.step + v * F::lanes);
        NVFP4_UNROLL
        for (int r = s * P::values; r < tile_rows; ++r) {
            const auto left = broadcast(a.at[r * a.row + (whole + s) * a.step]);
            for (int v = 0; v < vectors; ++v) {
                const auto seen = r == s * P::values ? P::first(right[v]) : right[v];
                sums.v[r][v] = dot(sums.v[r][v], left, seen);
            }
        }
    }
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

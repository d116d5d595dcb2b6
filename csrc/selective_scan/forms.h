// The forms in which a matrix enters a product. A matrix of `rows` x `cols` fp32 values is kept in panels: columns c ..
// c + width (width = `panel`, less in the last panel) of all rows lie together at c * rows, row after row.
//   rows kept    [rows][width / values]        left, summed over columns
//   rows paired  [rows / values][width]        left or right, summed over rows
//   turned       [cols / values][rows]         right, summed over columns
// For fp32 steps the first two are the matrix itself.
#pragma once
#include "product.h"

namespace nvfp4 {
namespace NVFP4_ISA {

// A matrix of fp32 steps is both forms of itself; one of bf16 has them apart.
template <class P>
static inline const typename P::Step* either(const float* wide, const typename P::Step* narrow) {
    if constexpr (P::values == 1) {
        return wide;
    } else {
        return narrow;
    }
}

// Thirty-two values in order.
template <class P>
NVFP4_INLINE void store_kept32(const F* from, typename P::Step* to) {
    if constexpr (P::values == 1) {
        for (int v = 0; v < 32 / F::lanes; ++v) store(to + v * F::lanes, from[v]);
    } else {
        store(to, P::narrow(from[0], from[1]));
    }
}

// `count` values (a multiple of 32, or of 16 in fp32) in order.
template <class P>
static inline void store_kept(const float* from, i64 count, typename P::Step* to) {
    if constexpr (P::values == 1) {
        __builtin_memcpy(to, from, static_cast<size_t>(count) * 4);
    } else {
        for (i64 i = 0; i < count; i += 32) {
            const F two[2] = {load(from + i), load(from + i + 16)};
            store_kept32<P>(two, to + i / 2);
        }
    }
}

template <class P>
static inline const typename P::Step* kept(const float* from, i64 count, typename P::Step* buffer) {
    if constexpr (P::values == 1) {
        return from;
    } else {
        store_kept<P>(from, count, buffer);
        return buffer;
    }
}

// Rows 0 .. rows of `height` in the panels of `from` and of `to`, each times its factor where there are factors.
template <class P>
static inline const typename P::Step* paired(const float* from, i64 rows, i64 height, i64 cols, i64 width,
                                             const float* factors, typename P::Step* buffer) {
    if constexpr (P::values == 1) {
        if (!factors) return from;
    }
    for (i64 c = 0; c < cols; c += width) {
        const i64 w = at_most(width, cols - c);
        for (i64 r = 0; r < rows; r += P::values) {
            const float* row = from + c * height + r * w;
            typename P::Step* to = buffer + c * (height / P::values) + r / P::values * w;
            if constexpr (P::values == 1) {
                const F factor(factors[r]);
                for (i64 i = 0; i < w; i += F::lanes) store(to + i, load(row + i) * factor);
            } else if (factors) {
                const F even(factors[r]), odd(factors[r + 1]);
                for (i64 i = 0; i < w; i += F::lanes) store(to + i, P::pair(load(row + i) * even, load(row + w + i) * odd));
            } else {
                for (i64 i = 0; i < w; i += F::lanes) store(to + i, P::pair(load(row + i), load(row + w + i)));
            }
        }
    }
    return buffer;
}

// Steps in the kept form, `rows` a multiple of 16 and width / values of 16, to the turned form.
template <class Step>
static inline void turn(const Step* from, i64 rows, i64 steps, i64 width, Step* to) {
    for (i64 s = 0; s < steps; s += width) {
        const i64 w = at_most(width, steps - s);
        for (i64 i = 0; i < w; i += 16) {
            for (i64 r = 0; r < rows; r += 16) {
                const Step* at = from + s * rows + r * w + i;
                transpose16(reinterpret_cast<const float*>(at), w, reinterpret_cast<float*>(to + (s + i) * rows + r), rows);
            }
        }
    }
}

// `count` rows of `cols` values, `stride` apart, to `height` rows of `padded` in panels of `width`, zero where there are none.
template <class T>
static inline void read_rows(const T* from, i64 stride, i64 count, i64 cols, i64 height, i64 padded, i64 width, float* to) {
    for (i64 r = 0; r < count; ++r, from += stride) {  // a row at a time: many rows may share few cache sets
        for (i64 c = 0; c < padded; c += width) {
            const i64 w = at_most(width, padded - c);
            float* out = to + c * height + r * w;
            i64 i = 0;
            for (; i < w && c + i + 16 <= cols; i += 16) widen16(from + c + i, out + i);
            for (; i < w; i += 16) {
                const i64 left = at_most(cols > c + i ? cols - c - i : 0, 16);
                widen_some(from + (left ? c + i : 0), 1, static_cast<int>(left), out + i);
            }
        }
    }
    for (i64 c = 0; c < padded && count < height; c += width) {
        const i64 w = at_most(width, padded - c);
        __builtin_memset(to + c * height + count * w, 0, static_cast<size_t>((height - count) * w) * 4);
    }
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// A few rows of a times a plain b: both are read along k where they lie, nothing is packed. Sixteen rows of b stay in the
// first-level cache while the rows of a pass by.
#pragma once
#include <type_traits>

#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "kernel.h"
#include "operand.h"

namespace nvfp4 {
namespace NVFP4_ISA {

constexpr i64 few_plain = 12;  // rows that share one reading of b
constexpr i64 plain_run = 32;  // values: a whole number of vectors of steps, and of sixteens
// most_few_plain: rows beyond which packing b for the kernel of many rows is faster. plain_cols: columns at once, kernel_rows *
// plain_cols sums in registers. plain_apart: whether they are no neighbours but shares of sixteen columns, each read on where
// the column before ended, as prefetchers like it.
#if defined(NVFP4_ISA_AVX512) || defined(NVFP4_ISA_NEON)
constexpr i64 most_few_plain = 12;  // at 464 x 672 and 672 x 464, with AVX-512
constexpr int plain_cols = 4;
constexpr bool plain_apart = false;
#elif defined(NVFP4_ISA_AVX2)
constexpr i64 most_few_plain = 48;  // at 1024 x 1024 and 4096 x 4096: 24 rows are 1.5 times as fast, 48 are 1.2 times
constexpr int plain_cols = 2;
constexpr bool plain_apart = true;  // at 4096 x 4096: one row is 1.2 times as fast, three are 1.1 times
#else
constexpr i64 most_few_plain = 12;
constexpr int plain_cols = 2;
constexpr bool plain_apart = false;
#endif
constexpr i64 fewest_plain = 2;  // so few rows take fewest_cols columns, whose sums do not wait for each other
constexpr int fewest_cols = 4;

// Whether b's rows lie in memory as the kernel wants to read them.
template <class P>
static inline bool reads_plain(const Operand& b) {
    return b.kind < Kind::nvfp4 && b.col_stride == 1 && (P::values == 1 || b.kind == Kind::bf16 || b.kind == Kind::fp8);
}

// Steps from a row in memory.
template <class P, class T>
static inline auto load_steps(const T* from) {
    if constexpr (P::values == 1) {
        return load(from);
    } else if constexpr (std::is_same<T, E4m3>::value) {
        return P::narrow(load(from), load(from + F::lanes));
    } else {
        return load(reinterpret_cast<const typename P::Step*>(from));
    }
}

// sum[r][j] += a[r] . b[j] over `vectors` vectors of steps.
template <class P, int rows, int count, class T>
static inline void dot_plain(const typename P::Step* a, i64 a_stride, const T* const* b, i64 vectors, F (*sum)[count]) {
    constexpr i64 apart = F::lanes * (std::is_same<T, typename P::Step>::value ? 1 : P::values);
    F total[rows][count];
    for (int r = 0; r < rows; ++r) {
        for (int j = 0; j < count; ++j) total[r][j] = sum[r][j];
    }
    for (i64 i = 0; i < vectors; ++i) {
        decltype(load(a)) right[count];
        for (int j = 0; j < count; ++j) right[j] = load_steps<P>(b[j] + i * apart);
        for (int r = 0; r < rows; ++r) {
            const auto left = load(a + r * a_stride + i * F::lanes);
            for (int j = 0; j < count; ++j) total[r][j] = dot(total[r][j], left, right[j]);
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int j = 0; j < count; ++j) sum[r][j] = total[r][j];
    }
}

template <class P, int count, class T>
static inline void dot_plain_rows(i64 rows, const typename P::Step* a, i64 a_stride, const T* const* b, i64 vectors,
                                  F (*sum)[count]) {
    if (rows == 1) return dot_plain<P, 1>(a, a_stride, b, vectors, sum);
    if (rows == 2) return dot_plain<P, 2>(a, a_stride, b, vectors, sum);
    if constexpr (count == plain_cols) {
        switch (rows) {
            case 3: return dot_plain<P, 3>(a, a_stride, b, vectors, sum);
            case 4: return dot_plain<P, 4>(a, a_stride, b, vectors, sum);
            case 5: return dot_plain<P, 5>(a, a_stride, b, vectors, sum);
            case 6: return dot_plain<P, 6>(a, a_stride, b, vectors, sum);
            default: return;
        }
    }
}

// Columns `cols` of m rows from `first` on, `count` columns at once; done as in few_rows.h. False: memory ran out.
template <class P, int count, class T, class Done>
static inline bool multiply_few_plain(const MatmulParams& p, i64 first, i64 m, const T* b, Range cols, Done done) {
    using Step = typename P::Step;
    static thread_local Scratch scratch;
    const i64 k = p.b.cols, whole = k / plain_run * plain_run, padded = (k + plain_run - 1) / plain_run * plain_run;
    constexpr i64 run_steps = plain_run / P::values;
    const i64 a_stride = padded / P::values, vectors = whole / P::values / F::lanes;
    Step* a = static_cast<Step*>(scratch.get((m * a_stride + count * run_steps) * 4));
    if (!a) return false;
    Step* tails = a + m * a_stride;
    for (i64 r = 0; r < m; ++r) read_row<P>(p.a, first + r, 0, padded, a + r * a_stride);

    for (i64 col = cols.begin; col < cols.end; col += 16) {
        alignas(64) float sums[few_plain][16];
        const i64 width = cols.end - col < 16 ? cols.end - col : 16, shares = (width + count - 1) / count;
        for (i64 j = 0; j < shares; ++j) {
            i64 at[count];
            const T* rows[count];
            const Step* ends[count];
            for (i64 c = 0; c < count; ++c) {
                const i64 own = plain_apart ? c * shares + j : j * count + c;
                at[c] = own < width ? own : width - 1;  // beyond the last: the last again
                rows[c] = b + (col + at[c]) * p.b.row_stride;
                ends[c] = tails + c * run_steps;
                if (whole < k) read_row<P>(p.b, col + at[c], whole, plain_run, tails + c * run_steps);
            }
            for (i64 r = 0; r < m; r += kernel_rows) {
                const i64 some = m - r < kernel_rows ? m - r : kernel_rows;
                F total[kernel_rows][count];
                for (auto& row : total) {
                    for (F& sum : row) sum = F(0.0f);
                }
                dot_plain_rows<P>(some, a + r * a_stride, a_stride, rows, vectors, total);
                if (whole < k) {
                    dot_plain_rows<P>(some, a + r * a_stride + whole / P::values, a_stride, ends, run_steps / F::lanes, total);
                }
                for (i64 i = 0; i < some; ++i) {
                    for (i64 c = 0; c < count; ++c) sums[r + i][at[c]] = sum(total[i][c]);
                }
            }
        }
        for (i64 r = 0; r < m; ++r) done(sums[r], first + r, col, width);
    }
    return true;
}

// The same, up to few_plain rows.
template <class P, class Done>
static inline bool multiply_few_plain(const MatmulParams& p, i64 first, i64 m, Range cols, Done done) {
    const auto multiply = [&](auto* b) {
        if (m <= fewest_plain) return multiply_few_plain<P, fewest_cols>(p, first, m, b, cols, done);
        return multiply_few_plain<P, plain_cols>(p, first, m, b, cols, done);
    };
    if (p.b.kind == Kind::fp8) return multiply(static_cast<const E4m3*>(p.b.data));
    if constexpr (P::values == 1) {
        switch (p.b.kind) {
            case Kind::fp16: return multiply(static_cast<const Half*>(p.b.data));
            case Kind::fp32: return multiply(static_cast<const Single*>(p.b.data));
            default: break;
        }
    }
    return multiply(static_cast<const Brain*>(p.b.data));
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// Part of a product: rows and columns of y, for the loops of matmul and, through columns.h, grouped_matmul. The operands are
// decoded in cache-sized blocks, b's transposed into panels, and multiplied by a kernel that holds `kernel_rows` x `panel` sums in
// registers. Each sum runs over k in order, in chunks of `chunk` steps that are then added up: the order, and so the result, is
// the same for every number of threads and every position in the matrix.
#pragma once
#include <type_traits>

#include "columns.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "few_rows.h"
#include "few_rows_plain.h"
#include "kernel.h"
#include "operand.h"
#include "squares.h"

namespace nvfp4 {
namespace NVFP4_ISA {

// Sizes in columns, rows and values of k. A chunk of one panel (64 columns x 128 steps x 4 bytes = 32 KiB) stays in the
// first-level cache while the block's rows pass by; the chunk also bounds the rounding error of the sums.
constexpr i64 chunk = 128;        // steps
constexpr i64 block_cols = 512;   // columns packed at once
constexpr i64 block_chunks = 8;   // chunks packed at once
constexpr i64 block_rows = 96;    // rows of a decoded at once, a multiple of kernel_rows and of 16
constexpr i64 carry_rows = 2048;  // rows whose sums are kept when k needs several blocks, a multiple of 16

static inline i64 ceil_to(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }

// Sums to results: `count` columns of a row.
template <class T>
static inline void finish(const MatmulParams& p, float g, const float* sums, i64 row, i64 col, i64 count) {
    T* out = static_cast<T*>(p.out) + row * p.b.rows + col;
    for (i64 j = 0; j < count; j += 16) {
        const int width = static_cast<int>(at_most(count - j, 16));
        F y[vectors16];
        for (int i = 0; i < vectors16; ++i) y[i] = load(sums + j + i * F::lanes) * F(g);
        if (p.bias) {
            alignas(64) float bias[16];
            with_dtype(p.bias_dtype, [&](auto* type) {
                widen_some(static_cast<const std::remove_pointer_t<decltype(type)>*>(p.bias) + col + j, 1, width, bias);
            });
            for (int i = 0; i < vectors16; ++i) y[i] = y[i] + load(bias + i * F::lanes);
        }
        if (p.relu2) {
            for (int i = 0; i < vectors16; ++i) {
                const F positive = greatest(F(0.0f), y[i]);  // NaN stays
                y[i] = positive * positive;
            }
        }
        if (p.accumulate) {
            alignas(64) float before[16];
            widen_some(out + j, 1, width, before);
            for (int i = 0; i < vectors16; ++i) y[i] = load(before + i * F::lanes) + y[i];
        }
        if (p.squares) square<T>(*p.squares, row, col + j, p.b.rows, width, y);
        store_some(y, out + j, width);
    }
}

// One thread's rectangle. False when memory ran out.
template <class P>
static inline bool rectangle(const MatmulParams& p, float g, i64 k, Range rows, Range cols) {
    using Step = typename P::Step;
    static thread_local Scratch scratch;
    constexpr i64 chunk_values = chunk * P::values, block_values = chunk_values * block_chunks;
    const i64 width = ceil_to(at_most(block_cols, cols.end - cols.begin), 16);
    const i64 depth = ceil_to(at_most(block_values, k), 16) / P::values;
    const i64 m = rows.end - rows.begin;
    const bool whole = k <= block_values;  // then a block's sums are finished as soon as they are made
    const i64 kept = ceil_to(at_most(m, whole ? block_rows : carry_rows), kernel_rows);
    constexpr i64 a_stride = chunk + 16;  // not a power of two: the rows of a block should not share cache sets

    char* memory = static_cast<char*>(scratch.get((width * depth + block_rows * a_stride + 16 * a_stride + kept * width) * 4));
    if (!memory) return false;
    Step* packed = reinterpret_cast<Step*>(memory);
    Step* left = packed + width * depth;
    Step* buffer = left + block_rows * a_stride;
    float* sums = reinterpret_cast<float*>(buffer + 16 * a_stride);

    for (i64 jc = cols.begin; jc < cols.end; jc += block_cols) {
        const i64 nc = at_most(block_cols, cols.end - jc), nc16 = ceil_to(nc, 16);
        const i64 carried = whole ? m : carry_rows;
        for (i64 im = rows.begin; im < rows.end; im += carried) {
            const i64 im_end = at_most(im + carried, rows.end);
            for (i64 kb = 0; kb < k; kb += block_values) {
                const i64 kb_end = ceil_to(at_most(kb + block_values, k), 16);
                for (i64 kc = kb; kc < kb_end; kc += chunk_values) {
                    const i64 length = at_most(chunk_values, kb_end - kc);
                    Step* at = packed + (kc - kb) / P::values * nc16;
                    for (i64 j = 0; j < nc16; j += panel) {
                        const i64 w = at_most(panel, nc16 - j);
                        pack_columns<P>(p.b, jc + j, at_most(w, nc - j), kc, length, at + j * (length / P::values), w, buffer);
                    }
                }
                for (i64 ic = im; ic < im_end; ic += block_rows) {
                    const i64 mc = at_most(block_rows, im_end - ic);
                    float* c = sums + (whole ? 0 : (ic - im) * nc16);
                    for (i64 kc = kb; kc < kb_end; kc += chunk_values) {
                        const i64 length = at_most(chunk_values, kb_end - kc), steps = length / P::values;
                        read_rows<P>(p.a, ic, mc, kc, length, left, a_stride);
                        const Step* at = packed + (kc - kb) / P::values * nc16;
                        for (i64 j = 0; j < nc16; j += panel) {
                            const i64 w = at_most(panel, nc16 - j);
                            multiply_block<P>(left, a_stride, mc, at + j * steps, w, steps, c + j, nc16, kc == 0);
                        }
                    }
                    if (kb + block_values < k) continue;
                    with_dtype(p.out_dtype, [&](auto* type) {
                        using T = std::remove_pointer_t<decltype(type)>;
                        for (i64 i = 0; i < mc; ++i) finish<T>(p, g, c + i * nc16, ic + i, jc, nc);
                    });
                    turn(p, {ic, ic + mc}, {jc, jc + nc});
                }
            }
        }
    }
    return true;
}

void no_products(const MatmulParams& p, float g, Range cols) {
    const float zeros[16] = {};
    with_dtype(p.out_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (i64 i = 0; i < p.a.rows; ++i) {
            for (i64 j = cols.begin; j < cols.end; j += 16) finish<T>(p, g, zeros, i, j, at_most(16, cols.end - j));
        }
    });
}

// Whether the product is made row by row of b, without packing b: the threads then share its columns alone.
template <class P>
static inline bool few(const MatmulParams& p) {
    if (p.b.scales) return p.b.kind == Kind::nvfp4 && p.b.row_stride != 1 && p.a.rows <= most_few_rows;
    return reads_plain<P>(p.b) && p.a.rows <= most_few_plain;
}

template <class P>
bool multiply_cols(const MatmulParams& p, float g, i64 k, Range cols) {
    const i64 m = p.a.rows;
    if (cols.begin >= cols.end) return true;
    if (!few<P>(p)) return rectangle<P>(p, g, k, {0, m}, cols);
    const auto done = [&](const float* sums, i64 row, i64 col, i64 width) {
        with_dtype(p.out_dtype, [&](auto* type) {
            finish<std::remove_pointer_t<decltype(type)>>(p, g, sums, row, col, width);
        });
    };
    bool ok = true;
    if (p.b.kind != Kind::nvfp4) {
        for (i64 r = 0; r < m; r += few_plain) ok = multiply_few_plain<P>(p, r, at_most(few_plain, m - r), cols, done) && ok;
    } else {
        for (i64 r = 0; r < m; r += few_rows) ok = multiply_few_rows<P>(p, r, at_most(few_rows, m - r), cols, done) && ok;
    }
    turn(p, {0, m}, cols);
    return ok;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

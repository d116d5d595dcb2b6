// Operands as the kernels read them: rows of steps (cpu/steps.h).
// Codes are decoded with the block scale alone, which is exact in bf16 (at most 6 significant bits).
#pragma once
#include <type_traits>

#include "cpu/decode.h"
#include "params.h"

namespace nvfp4 {
namespace NVFP4_ISA {

// Calls f with a function of x in blocks: decode16(at, out) gives the sixteen values from value `at` in memory on.
template <class Function>
static inline void with_blocks(const Operand& x, Function f) {
    const u8 *codes = static_cast<const u8*>(x.data), *scales = x.scales;
    if (x.kind == Kind::nvfp4) {
        f([=](i64 at, F* out) { decode_nvfp4(codes + at / 2, e4m3_values.v[scales[at / 16]], out); });
    } else {
        f([=](i64 at, F* out) { decode_e4m3(codes + at, e8m0_value(scales[at / 32]), out); });
    }
}

// The same of a plain operand, `inside` of them stored.
template <class P, class T>
static inline void read_plain(const T* from, i64 stride, i64 inside, i64 length, typename P::Step* out) {
    if (stride == 1 && sizeof(T) * P::values == sizeof(typename P::Step)) {  // already steps
        const i64 whole = inside < length ? inside : length;
        __builtin_memcpy(out, from, static_cast<size_t>(whole) * sizeof(T));
        __builtin_memset(reinterpret_cast<char*>(out) + whole * static_cast<i64>(sizeof(T)), 0,
                         static_cast<size_t>(length - whole) * sizeof(T));
        return;
    }
    for (i64 j = 0; j < length; j += 16) {
        const i64 left = inside - j;
        alignas(64) float wide[16];
        if (stride == 1 && left >= 16) {
            widen16(from + j, wide);
        } else {
            widen_some(from + (left > 0 ? j * stride : 0), stride, static_cast<int>(left < 0 ? 0 : left < 16 ? left : 16), wide);
        }
        F values[vectors16];
        for (int i = 0; i < vectors16; ++i) values[i] = load(wide + i * F::lanes);
        P::put16(values, out + j / P::values);
    }
}

static inline i64 stored_row(const Operand& x, i64 row) { return x.row_index ? x.row_index[row] : row; }

// Row `row` of x, values k .. k + length (multiples of 16), zero beyond the stored columns.
template <class P>
static inline void read_row(const Operand& x, i64 row, i64 k, i64 length, typename P::Step* out) {
    row = stored_row(x, row);
    const i64 left = x.cols > k ? x.cols - k : 0, inside = left < length ? left : length;
    const auto plain = [&](auto* data) {
        read_plain<P>(data + (inside ? row * x.row_stride + k * x.col_stride : 0), x.col_stride, inside, length, out);
    };
    switch (x.kind) {
        case Kind::fp32: return plain(static_cast<const Single*>(x.data));
        case Kind::fp16: return plain(static_cast<const Half*>(x.data));
        case Kind::bf16: return plain(static_cast<const Brain*>(x.data));
        case Kind::fp8: return plain(static_cast<const E4m3*>(x.data));
        default: break;
    }
    with_blocks(x, [&](auto decode16) {
        for (i64 j = 0; j < inside; j += 16) {
            F values[vectors16];
            decode16(row * x.row_stride + k + j, values);
            P::put16(values, out + j / P::values);
        }
    });
    __builtin_memset(out + inside / P::values, 0, static_cast<size_t>((length - inside) / P::values) * 4);
}

// Rows of a plain x whose columns lie side by side in memory, sixteen at a time, transposed: out[step * width + row]. Rows beyond
// the stored ones, and values beyond the stored columns, are zero.
template <class P, class T>
static inline void turn_side_by_side(const Operand& x, const T* from, i64 row, i64 count, i64 k, i64 length, typename P::Step* out,
                                     i64 width) {
    constexpr i64 ahead = 16;  // columns: each is a short piece of its line, which no hardware prefetcher foresees
    const auto line = [&](i64 col) { return from + (x.col_index ? x.col_index[col] : col) * x.col_stride + row; };
    T zeros[16] = {}, run[P::values][16];
    for (i64 s = 0; s < length / P::values; ++s) {
        const i64 col = k + s * P::values;
        for (i64 v = 0; v < P::values && col + v + ahead < x.cols; ++v) {
            const T* next = line(col + v + ahead);
            for (i64 g = 0; g < count; g += 64 / static_cast<i64>(sizeof(T))) __builtin_prefetch(next + g, 0, 2);
        }
        for (i64 g = 0; g < count; g += 16) {
            const i64 inside = x.rows - row - g < 16 ? x.rows - row - g : 16;
            const T* at[P::values];
            for (i64 v = 0; v < P::values; ++v) {
                at[v] = col + v < x.cols ? line(col + v) + g : zeros;
                if (col + v < x.cols && inside < 16) {
                    for (i64 i = 0; i < 16; ++i) run[v][i] = i < inside ? at[v][i] : T{};
                    at[v] = run[v];
                }
            }
            typename P::Step* to = out + s * width + g;
            for (i64 l = 0; l < 16; l += F::lanes) {
                if constexpr (P::values == 1) {
                    store(to + l, load(at[0] + l));
                } else {
                    store(to + l, (bits(load(at[0] + l)) >> 16) | bits(load(at[1] + l)));  // two bf16 to a word
                }
            }
        }
    }
}

// The same where blocks lie along the rows; `row` is a multiple of 16.
template <class P>
static inline void turn_blocks(const Operand& x, i64 row, i64 count, i64 k, i64 length, typename P::Step* out, i64 width) {
    constexpr i64 ahead = 16;
    const i64 per_byte = x.kind == Kind::nvfp4 ? 2 : 1;
    with_blocks(x, [&](auto decode16) {
        for (i64 s = 0; s < length / P::values; ++s) {
            const i64 col = k + s * P::values;
            for (i64 v = 0; v < P::values && col + v + ahead < x.cols; ++v) {
                __builtin_prefetch(static_cast<const u8*>(x.data) + ((col + v + ahead) * x.col_stride + row) / per_byte, 0, 2);
            }
            for (i64 g = 0; g < count; g += 16) {
                F values[P::values][vectors16];
                for (i64 v = 0; v < P::values; ++v) {
                    for (F& zero : values[v]) zero = F(0.0f);
                    if (col + v < x.cols) decode16((col + v) * x.col_stride + row + g, values[v]);
                }
                typename P::Step* to = out + s * width + g;
                for (int i = 0; i < vectors16; ++i) {
                    if constexpr (P::values == 1) {
                        store(to + i * F::lanes, values[0][i]);
                    } else {
                        store(to + i * F::lanes, (bits(values[0][i]) >> 16) | bits(values[1][i]));
                    }
                }
            }
        }
    });
}

template <class P>
static inline bool side_by_side(const Operand& x) {
    if (x.row_index || x.row_stride != 1) return false;
    return x.scales || (x.col_stride != 1 && (P::values == 1 || x.kind == Kind::bf16 || x.kind == Kind::fp8));
}

template <class P>
static inline void turn_rows(const Operand& x, i64 row, i64 count, i64 k, i64 length, typename P::Step* out, i64 width) {
    const auto turn = [&](auto* from) { turn_side_by_side<P>(x, from, row, count, k, length, out, width); };
    if (x.scales) return turn_blocks<P>(x, row, count, k, length, out, width);
    if (x.kind == Kind::fp8) return turn(static_cast<const E4m3*>(x.data));
    if constexpr (P::values == 1) {
        if (x.kind == Kind::fp32) return turn(static_cast<const Single*>(x.data));
        if (x.kind == Kind::fp16) return turn(static_cast<const Half*>(x.data));
    }
    turn(static_cast<const Brain*>(x.data));
}

// Writes whole sixteens of rows where the columns lie side by side; `out` has room for them, and for whole sixteens of steps.
template <class P>
static inline void read_rows(const Operand& x, i64 row, i64 count, i64 k, i64 length, typename P::Step* out, i64 stride) {
    if (!side_by_side<P>(x)) {
        for (i64 r = 0; r < count; ++r) read_row<P>(x, row + r, k, length, out + r * stride);
        return;
    }
    for (i64 r = 0; r < count; r += 16) {
        for (i64 v = 0; v < length; v += 16 * P::values) {
            alignas(64) float turned[16][16] = {};
            const i64 some = length - v < 16 * P::values ? length - v : 16 * P::values;
            turn_rows<P>(x, row + r, 16, k + v, some, reinterpret_cast<typename P::Step*>(turned[0]), 16);
            transpose16(turned[0], 16, reinterpret_cast<float*>(out + r * stride + v / P::values), stride);
        }
    }
}

// Starts fetching what read_row will want. A block of k is a short piece of each of many rows, which no hardware prefetcher
// foresees. Always inlined, since GCC takes a function that only prefetches for one without effect and drops its calls.
__attribute__((always_inline)) static inline void prefetch_row(const Operand& x, i64 row, i64 k, i64 length) {
    if (row >= x.rows || k >= x.cols || (x.kind < Kind::nvfp4 && x.col_stride != 1)) return;
    const char* base = static_cast<const char*>(x.data);
    const i64 quarters = x.kind == Kind::fp32 ? 16 : x.kind == Kind::nvfp4 ? 2 : x.kind >= Kind::fp8 ? 4 : 8;  // of a byte
    row = stored_row(x, row);
    const char* from = base + (row * x.row_stride + k) * quarters / 4;
    for (i64 i = 0; i < length * quarters / 4; i += 64) __builtin_prefetch(from + i, 0, 2);
    if (x.scales) __builtin_prefetch(x.scales + (row * x.row_stride + k) / (x.kind == Kind::nvfp4 ? 16 : 32), 0, 2);
}

// Rows of b, sixteen at a time, transposed: out[step * width + column], for the kernel's vertical loads. Columns beyond b's
// rows are zero.
template <class P>
static inline void pack_columns(const Operand& b, i64 row, i64 count, i64 k, i64 length, typename P::Step* out, i64 width,
                                typename P::Step* buffer) {
    if (side_by_side<P>(b)) {
        return turn_rows<P>(b, row, count, k, length, out, width);
    }
    const i64 steps = length / P::values, stride = (steps + 15) / 16 * 16 + 16;
    for (i64 g = 0; g < count; g += 16) {
        const i64 rows = count - g < 16 ? count - g : 16;
        for (i64 r = 0; r < 16; ++r) prefetch_row(b, row + g + 16 + r, k, length);
        read_rows<P>(b, row + g, rows, k, length, buffer, stride);
        for (i64 r = rows; r < 16; ++r) __builtin_memset(buffer + r * stride, 0, static_cast<size_t>(steps) * 4);
        for (i64 s = 0; s < steps; s += 16) {
            const float* from = reinterpret_cast<const float*>(buffer + s);
            float* to = reinterpret_cast<float*>(out + s * width + g);
            if (steps - s >= 16) {
                transpose16(from, stride, to, width);
            } else {  // a last run of 16 bf16 values is 8 steps
                alignas(64) float turned[16][16];
                transpose16(from, stride, turned[0], 16);
                for (i64 i = 0; i < steps - s; ++i) __builtin_memcpy(to + i * width, turned[i], 64);
            }
        }
    }
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// quantize on the CPU: one read of x for the amax (of the values and of their transform) unless it is given, one for the codes
// of both forms.
//
//   g = 448 * 6 / amax,  scale = e4m3(amax_block * g / 6),  code = e2m1(x / (scale / g))        (numerics/block_scale.h)
//
// Bytes a value, bf16 in: 2 + 2 read, 0.5625 written a form. No result depends on which thread takes which unit of x.
#include "params.h"

#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "cpu/threads.h"
#include "encode.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

// 128 x 64 values: 64 bytes of codes, a cache line, for each of the column form's rows. With fewer rows a line would be
// written in parts, far apart in time, and at row strides of a power of two be lost to the cache in between.
constexpr i64 unit_elements = 8192, unit_cols = 64;
constexpr i64 scan_cols = 2048;  // where only the amax is wanted, long rows read faster
constexpr i64 elements_a_thread = 16384;  // less is not worth waking a thread for (some microseconds)

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

bool is_nvfp4(const QuantizeForm& form) { return form.block == Block::b1x16 || form.block == Block::b16x16; }

i64 run_length(const QuantizeForm& form) { return form.block == Block::b1x32 ? 32 : 16; }

// A magnitude's bit pattern in its own type to that of fp32; what is not finite stays not finite.
u32 as_fp32_bits(Single x) { return x.bits; }
u32 as_fp32_bits(Brain x) { return static_cast<u32>(x.bits) << 16; }
u32 as_fp32_bits(Half x) {
    Half run[16] = {x};
    float wide[16];
    widen16(run, wide);
    return bits(F32x1(wide[0])).v;
}

// Largest |x| of a region as fp32 bits: magnitudes' bit patterns order as the magnitudes do, infinities and NaN above all.
template <class T>
u32 scan(const Matrix& x, i64 row, i64 rows, i64 col, i64 cols) {
    if (x.col_stride == 1 && x.row_stride == cols && !x.row_index) {  // contiguous: one long row
        cols *= rows;
        rows = 1;
    }
    using Bits = decltype(T::bits);
    constexpr Bits mask = static_cast<Bits>(~Bits(0)) >> 1;
    Bits most = 0;
    for (i64 i = 0; i < rows; ++i) {
        const T* from = line_of<T>(x, row + i, col);
        const i64 stride = x.col_stride;
        if (stride == 1) {  // apart, for the compiler to vectorize
            for (i64 j = 0; j < cols; ++j) {
                const Bits b = from[j].bits & mask;
                most = b > most ? b : most;
            }
        } else {
            for (i64 j = 0; j < cols; ++j) {
                const Bits b = from[j * stride].bits & mask;
                most = b > most ? b : most;
            }
        }
    }
    return as_fp32_bits(T{most});
}

// A square of 2x2 tiles: 32 values, an MXFP8 block and a cache line of 16-bit values, in either direction.
struct Square {
    Tile tile[2][2];
    i64 row, col;
    int down, across;  // tiles that hold any of the matrix: 1 or 2
};

// `next`: elements from here to a square that is wanted soon; of indexed rows the square below is.
template <class T>
void load_square(const Matrix x, i64 row, i64 col, i64 next, Square& s) {
    s.row = row;
    s.col = col;
    s.down = x.rows - row > 16 ? 2 : 1;
    s.across = x.cols - col > 16 ? 2 : 1;
    if (x.col_stride == 1 && x.rows - row >= 32 && x.cols - col >= 32) {
        // Whole cache lines, row by row: with a row stride of a power of two only a few lines of the 32 rows fit in their
        // set of the cache, and coming back for the second half would miss. No hardware prefetcher follows 32 streams.
        for (int i = 0; i < 32; ++i) {
            const T* from = line_of<T>(x, row + i, col);
            __builtin_prefetch(x.row_index && row + i + 32 < x.rows ? line_of<T>(x, row + i + 32, col) : from + next);
            widen16(from, s.tile[i >> 4][0].v[i & 15]);
            widen16(from + 16, s.tile[i >> 4][1].v[i & 15]);
        }
        return;
    }
    for (int i = 0; i < s.down; ++i) {
        for (int j = 0; j < s.across; ++j) load_tile<T>(x, row + 16 * i, col + 16 * j, s.tile[i][j]);
    }
}

// One form of the matrix seen along its blocks: `count` rows of blocks, each `length` values long.
struct Form {
    const QuantizeForm& form;
    TensorScale scale;
    bool by_column;
    i64 count, length;

    i64 blocks(i64 run) const { return ceil_div(length, run); }

    Target target(i64 first, i64 element, i64 run, i64 block_bytes) const {
        const i64 n = form.line ? form.line : blocks(run), b = element / run;
        const i64 inside = count - first;
        return {form.codes + (first * n + b) * block_bytes, form.scales + first * n + b, n * block_bytes, n,
                form.first + first * n + b, n, static_cast<int>(inside < 16 ? inside : 16)};
    }
};

// The tile whose columns are the form's blocks: the tile itself for the column form, its transpose for the row form.
Tile& oriented(Square& s, bool by_column, int i, int j, Tile& buffer) {
    if (by_column) return s.tile[i][j];
    transpose16(s.tile[i][j], buffer);
    return buffer;
}

// The amax of the transform, lane by lane, into `amax`.
void add_rotated_amax(Square& s, bool by_column, u32 signs, float* amax) {
    Tile buffer;
    for (int i = 0; i < s.down; ++i) {
        for (int j = 0; j < s.across; ++j) {
            rotate_tile(by_column ? s.tile[i][j] : oriented(s, false, i, j, buffer), signs, buffer);
            add_block_amax(buffer, amax);
        }
    }
}

void encode_square(const Form& f, Square& s) {
    Tile buffer[2];
    const i64 first = f.by_column ? s.col : s.row, element = f.by_column ? s.row : s.col;
    const int firsts = f.by_column ? s.across : s.down, elements = f.by_column ? s.down : s.across;
    for (int a = 0; a < firsts; ++a) {
        if (f.form.block == Block::b1x32) {
            buffer[1] = Tile();
            for (int b = 0; b < elements; ++b) {
                if (f.by_column) {
                    buffer[b] = s.tile[b][a];
                } else {
                    transpose16(s.tile[a][b], buffer[b]);
                }
            }
            encode_mxfp8(buffer, f.target(first + 16 * a, element, 32, 32));
            continue;
        }
        for (int b = 0; b < elements; ++b) {
            Tile& t = oriented(s, f.by_column, f.by_column ? b : a, f.by_column ? a : b, buffer[0]);
            if (f.form.hadamard >= 0) rotate_tile(t, static_cast<u32>(f.form.hadamard), t);
            encode_nvfp4(f.form, f.scale, t, f.target(first + 16 * a, element + 16 * b, 16, 8));
        }
    }
}

struct Amax {
    alignas(64) u32 raw = 0;  // bits; a cache line of its own for each thread
    float row = 0.0f, col = 0.0f;
};

// Calls f(row, rows, col, cols) for each unit, up to `width` columns wide, of the t-th part of the matrix.
template <class Function>
void each_unit(const Matrix& x, i64 width, int t, int n, Function f) {
    width = x.cols < width ? ceil_div(x.cols, 16) * 16 : width;
    if (width == 0) return;
    const i64 height = ceil_div(ceil_div(unit_elements, width), 32) * 32, across = ceil_div(x.cols, width);
    const Range range = part(ceil_div(x.rows, height) * across, 1, t, n);
    for (i64 u = range.begin; u < range.end; ++u) {
        const i64 row = u / across * height, col = u % across * width;
        f(row, x.rows - row < height ? x.rows - row : height, col, x.cols - col < width ? x.cols - col : width);
    }
}

// Calls f() with each square of a unit in `s`.
template <class T, class Function>
void each_square(const Matrix& x, i64 row, i64 rows, i64 col, i64 cols, Square& s, Function f) {
    for (i64 i = row; i < row + rows; i += 32) {
        // the rows below, or, from the bottom of the unit, the top of the unit to the right
        const i64 next = i + 32 < row + rows ? 32 * x.row_stride : (row - i) * x.row_stride + cols;
        for (i64 j = col; j < col + cols; j += 32) {
            load_square<T>(x, i, j, next, s);
            f();
        }
    }
}

constexpr u32 sign = 0x80000000u;

// What is handed in of a matrix's amaxes: none, that of the values, or those of the transforms too.
struct Given {
    bool values = false, turned = false;
    Amax amax;
};

bool turns(const QuantizeForm& form) { return is_nvfp4(form) && form.hadamard >= 0; }

template <class T>
Amax find_amax(const Matrix& x, const QuantizeForm& row, const QuantizeForm& col, const Given& given, int threads) {
    const bool row_turns = turns(row) && !given.turned, col_turns = turns(col) && !given.turned;
    std::vector<Amax> found(static_cast<size_t>(threads));
    auto body = [&](int t, int n) {
        Amax a;
        Square s;
        alignas(64) float row_amax[16] = {}, col_amax[16] = {};
        each_unit(x, row_turns || col_turns ? unit_cols : scan_cols, t, n, [&](i64 r, i64 rows, i64 c, i64 cols) {
            if (!given.values) {
                const u32 raw = scan<T>(x, r, rows, c, cols);
                a.raw = raw > a.raw ? raw : a.raw;
            }
            if (!row_turns && !col_turns) return;
            each_square<T>(x, r, rows, c, cols, s, [&] {
                if (row_turns) add_rotated_amax(s, false, static_cast<u32>(row.hadamard), row_amax);
                if (col_turns) add_rotated_amax(s, true, static_cast<u32>(col.hadamard), col_amax);
            });
        });
        a.row = largest16(row_amax);
        a.col = largest16(col_amax);
        found[static_cast<size_t>(t)] = a;
    };
    if (!given.values || row_turns || col_turns) parallel(threads, body);
    Amax total = given.amax;
    for (const Amax& a : found) {
        total.raw = a.raw > total.raw ? a.raw : total.raw;
        total.row = a.row > total.row ? a.row : total.row;
        total.col = a.col > total.col ? a.col : total.col;
    }
    const float raw = real(U32x1(total.raw)).v;
    if (!turns(row)) total.row = raw;
    if (!turns(col)) total.col = raw;
    return total;
}

// Zeros for `blocks` blocks of each line, from the form's first on.
void clear(const QuantizeForm& form, i64 lines, i64 blocks, i64 block_bytes) {
    const i64 line = form.line ? form.line : blocks;
    for (i64 i = 0; i < lines; ++i) {
        std::memset(form.codes + i * line * block_bytes, 0, static_cast<size_t>(blocks * block_bytes));
        std::memset(form.scales + i * line, 0, static_cast<size_t>(blocks));
    }
}

// A form of a tensor that is not finite: no code and no scale, and a global scale that makes every value NaN.
void poison(const Form& f) {
    clear(f.form, f.count, f.blocks(16), 8);
    *f.form.global_scale = real(U32x1(0x7FC00000u)).v;
}

template <class T>
void run(const Matrix& x, const QuantizeForm& row, const QuantizeForm& col, const Given& given, int threads) {
    Amax amax;
    if (is_nvfp4(row) || is_nvfp4(col)) amax = find_amax<T>(x, row, col, given, threads);
    const bool finite = amax.raw < 0x7F800000u;
    const auto scale = [](const QuantizeForm& f, float a) {
        return tensor_scale(a, f.four_over_six == FourOverSix::off ? 448.0f : 256.0f);
    };
    const Form forms[2] = {{row, scale(row, finite ? amax.row : 0.0f), false, x.rows, x.cols},
                           {col, scale(col, finite ? amax.col : 0.0f), true, x.cols, x.rows}};
    bool wanted[2];
    for (int i = 0; i < 2; ++i) {
        const Form& f = forms[i];
        wanted[i] = f.form.block == Block::b1x32 || (is_nvfp4(f.form) && finite);
        if (!is_nvfp4(f.form)) continue;
        if (finite) {
            *f.form.global_scale = f.scale.g_dec;
        } else {
            poison(f);
        }
    }
    if (!wanted[0] && !wanted[1]) return;
    auto body = [&](int t, int n) {
        Square s;
        each_unit(x, unit_cols, t, n, [&](i64 r, i64 rows, i64 c, i64 cols) {
            each_square<T>(x, r, rows, c, cols, s, [&] {
                for (int i = 0; i < 2; ++i) {  // the column form last: it turns the tiles in place
                    if (wanted[i]) encode_square(forms[i], s);
                }
            });
        });
    };
    parallel(threads, body);
}

void one(const QuantizeParams& p, const void* data, i64 rows, QuantizeForm row, QuantizeForm col, Given given,
         const i64* index = nullptr) {
    Matrix x{data, p.dtype, rows, p.cols, p.row_stride, p.col_stride, index};
    if (x.row_stride == 1 && x.col_stride != 1) {  // column-major: the transpose is row-major, and its forms change places
        std::swap(x.rows, x.cols);
        std::swap(x.row_stride, x.col_stride);
        std::swap(row, col);
        std::swap(given.amax.row, given.amax.col);
    }
    const i64 length = run_length(row);
    if (col.block == Block::none && row.block != Block::b16x16 && row.line == 0 && x.col_stride == 1 && x.row_stride == x.cols &&
        x.cols % length == 0 && x.cols > length) {
        // Blocks of contiguous rows are one long list of blocks: a matrix of one block a row, read and written in order.
        x.rows = x.rows * (x.cols / length);
        x.cols = x.row_stride = length;
    }
    const i64 most = x.rows * x.cols / elements_a_thread + 1;
    const int threads = static_cast<int>(p.threads < most ? p.threads : most);
    with_dtype(x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        run<T>(x, row, col, given, threads);
    });
}

// Where `elements` elements further are.
const void* at(const QuantizeParams& p, i64 elements) {
    return static_cast<const char*>(p.x) + elements * (p.dtype == fp32 ? 4 : 2);
}

// The form of matrix or group `index`, whose first block is so many blocks further.
QuantizeForm moved(QuantizeForm form, i64 blocks, i64 index) {
    form.codes += blocks * (form.block == Block::b1x32 ? 32 : 8);
    form.scales += blocks;
    form.global_scale += is_nvfp4(form) ? index : 0;
    form.first += blocks;
    return form;
}

// What p hands in of matrices or groups `first` to `last`: the largest of theirs.
Given given(const QuantizeParams& p, i64 first, i64 last) {
    Given g{p.amax != nullptr, p.turned, {}};
    const auto most = [&](i64 kind) {
        u32 found = 0;
        for (i64 e = first; e < last; ++e) {
            const u32 one = p.amax[kind * (p.offsets ? p.groups : 1) + e] & ~sign;
            found = one > found ? one : found;
        }
        return found;
    };
    if (g.values) g.amax.raw = most(0);
    if (g.turned) g.amax.row = real(U32x1(most(1))).v, g.amax.col = real(U32x1(most(2))).v;
    return g;
}

void stack(const QuantizeParams& p) {
    const Given all = given(p, 0, 1);
    const i64 row_blocks = p.rows * ceil_div(p.cols, run_length(p.row)), col_blocks = p.cols * ceil_div(p.rows, run_length(p.col));
    for (i64 e = 0; e < p.matrices; ++e) {
        one(p, at(p, e * p.matrix_stride), p.rows, moved(p.row, e * row_blocks, e), moved(p.col, e * col_blocks, e), all);
    }
}

void groups(const QuantizeParams& p) {
    const QuantizeForm none{Block::none, false, FourOverSix::off, -1, nullptr, nullptr, nullptr, 0, 0};
    const i64 run = run_length(p.col), used = p.starts[p.groups] / run;
    if (p.row.block != Block::none) {
        one(p, p.x, p.rows, p.row, none, given(p, 0, p.groups));
    }
    for (i64 e = 0; e < p.groups; ++e) {
        const i64 begin = p.offsets[e];
        const i64* const index = p.row_index ? p.row_index + begin : nullptr;
        one(p, index ? p.x : at(p, begin * p.row_stride), p.offsets[e + 1] - begin, none, moved(p.col, p.starts[e] / run, e),
            given(p, e, e + 1), index);
    }
    clear(moved(p.col, used, 0), p.cols, p.col.line - used, p.col.block == Block::b1x32 ? 32 : 8);
}

}  // namespace

int quantize(const QuantizeParams& p) {
    const DefaultFloats floats;
    if (p.offsets) {
        bool ascend = p.offsets[0] == 0 && p.offsets[p.groups] == p.rows;
        for (i64 e = 0; e < p.groups; ++e) ascend = ascend && p.offsets[e] <= p.offsets[e + 1];
        if (!ascend) return 2;
    }
    try {
        if (p.offsets) {
            groups(p);
        } else {
            stack(p);
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

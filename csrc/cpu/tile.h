// A 16x16 tile of a matrix in fp32, the unit the row and the column form share: columns of the tile are blocks of the
// column form, its rows, after one transposition, blocks of the row form.
#pragma once
#include "numerics/hadamard.h"
#include "simd.h"

namespace nvfp4 {
namespace NVFP4_ISA {

struct alignas(64) Tile {
    float v[16][16];  // [element of a block][block]
};

static inline void transpose16(const Tile& in, Tile& out) { transpose16(in.v[0], 16, out.v[0], 16); }

struct Matrix {
    const void* data;
    int dtype;
    i64 rows, cols, row_stride, col_stride;  // strides in elements
    const i64* row_index = nullptr;          // [rows]: which stored row each row is; null: itself
};

// Row `row` of x from column `col` on.
template <class T>
static inline const T* line_of(const Matrix& x, i64 row, i64 col) {
    return static_cast<const T*>(x.data) + (x.row_index ? x.row_index[row] : row) * x.row_stride + col * x.col_stride;
}

// x[row .. row + 16, col .. col + 16], zero outside the matrix; t.v[i][j] = x[row + i, col + j].
template <class T>
static inline void load_tile(const Matrix x, i64 row, i64 col, Tile& t) {  // by value, whose loops then need not test the index
    const i64 rows = x.rows - row, cols = x.cols - col;
    if (x.col_stride == 1 && rows >= 16 && cols >= 16) {
        for (int i = 0; i < 16; ++i) widen16(line_of<T>(x, row + i, col), t.v[i]);
        return;
    }
    for (int i = 0; i < 16; ++i) {
        if (x.col_stride == 1 && i < rows && cols >= 16) {
            widen16(line_of<T>(x, row + i, col), t.v[i]);
        } else {
            const int count = i < rows ? static_cast<int>(cols < 16 ? cols : 16) : 0;
            widen_some(count ? line_of<T>(x, row + i, col) : static_cast<const T*>(x.data), x.col_stride, count, t.v[i]);
        }
    }
}

// The transform along the elements of each block of the tile; `out` may be `t`.
static inline void rotate_tile(const Tile& t, u32 signs, Tile& out) {
    for (int l = 0; l < 16; l += F::lanes) {
        F v[16];
        NVFP4_UNROLL
        for (int j = 0; j < 16; ++j) v[j] = load(t.v[j] + l);
        hadamard16(v, signs);
        NVFP4_UNROLL
        for (int j = 0; j < 16; ++j) store(out.v[j] + l, v[j]);
    }
}

// Largest magnitude of each block, and of what `amax` already holds.
static inline void add_block_amax(const Tile& t, float* amax) {
    for (int l = 0; l < 16; l += F::lanes) {
        F m = load(amax + l);
        NVFP4_UNROLL
        for (int j = 0; j < 16; ++j) m = greatest(m, magnitude(load(t.v[j] + l)));
        store(amax + l, m);
    }
}

static inline float largest16(const float* x) {
    F m = load(x);
    for (int l = F::lanes; l < 16; l += F::lanes) m = greatest(m, load(x + l));
    return largest(m);
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// hadamard on the CPU: sixteen runs at a time, transposed so that a butterfly is one vertical addition.
#include "params.h"

#include <type_traits>

#include "cpu/threads.h"
#include "cpu/tile.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

template <class T>
void transform_rows(const Matrix& x, u32 signs, Brain* out, i64 begin, i64 end) {
    const i64 padded = (x.cols + 15) / 16 * 16;
    Tile tile, turned;
    for (i64 r = begin; r < end; r += 16) {
        for (i64 c = 0; c < x.cols; c += 16) {
            load_tile<T>(x, r, c, tile);
            transpose16(tile, turned);
            rotate_tile(turned, signs, turned);
            transpose16(turned, tile);
            for (i64 i = 0; i < 16 && r + i < x.rows; ++i) narrow16(tile.v[i], out + (r + i) * padded + c);
        }
    }
}

}  // namespace

int hadamard(const HadamardParams& p) {
    Matrix x{p.x, p.dtype, p.rows, p.cols, p.row_stride, p.col_stride};
    if (x.col_stride == 1 && x.row_stride == x.cols && x.cols % 16 == 0 && x.cols > 16) {
        // contiguous rows are one list of runs: read and written in order
        x.rows = x.rows * (x.cols / 16);
        x.cols = x.row_stride = 16;
    }
    const i64 most = p.rows * p.cols / 16384 + 1;
    auto body = [&](int t, int n) {
        const Range rows = part(x.rows, 16, t, n);
        with_dtype(p.dtype, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            transform_rows<T>(x, p.signs, reinterpret_cast<Brain*>(p.out), rows.begin, rows.end);
        });
    };
    parallel(static_cast<int>(p.threads < most ? p.threads : most), body);
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

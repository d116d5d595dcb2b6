// quantize: matrices to their row form and their column form (the form of the transpose), either or both, in one call: one
// matrix, a stack of them, or the groups of rows of one.
#pragma once
#include "options.h"

namespace nvfp4 {

struct QuantizeForm {
    Block block;
    bool stochastic;
    FourOverSix four_over_six;
    i32 hadamard;         // sign mask, or -1
    u8* codes;            // [blocks' rows, ceil16(length) / 2], MXFP8 [.., ceil32(length)]
    u8* scales;           // [blocks' rows, ceil16(length) / 16], MXFP8 [.., ceil32(length) / 32]
    float* global_scale;  // [1]; not touched for MXFP8
    u64 seed, offset;     // of the stochastic rounding
    i64 line = 0;         // blocks from one of the blocks' rows to the next; 0: as many as it has
    i64 first = 0;        // the number of the first block in the noise
};

struct QuantizeParams {
    const void* x;
    int dtype;                           // 0 fp32, 1 fp16, 2 bf16
    i64 rows, cols;
    i64 row_stride, col_stride;          // in elements
    QuantizeForm row, col;
    int threads;
    i64 matrices = 1, matrix_stride = 0;  // of a stack, whose forms lie one behind the other
    // Or groups, each a matrix to the column form alone: group e has the rows offsets[e] to offsets[e + 1], and the values from
    // starts[e] on of each of the form's lines, whose length is col.line; global_scale has one for each.
    const i64* offsets = nullptr;
    const i64* starts = nullptr;
    i64 groups = 0;
    // Bits of fp32, of x or of each group, in the place of what a read of x finds; or null. turned: behind them those of the row
    // form's transform, and then of the column form's.
    const u32* amax = nullptr;
    bool turned = false;
    // [rows], of groups of a row-major x without a row form: which stored row each row is; null: itself
    const i64* row_index = nullptr;
};

// Return 0, 1 when memory ran out, or 2 when offsets are not ascending numbers from 0 to rows.
namespace scalar { int quantize(const QuantizeParams&); }
namespace neon { int quantize(const QuantizeParams&); }
namespace avx2 { int quantize(const QuantizeParams&); }
namespace avx512 { int quantize(const QuantizeParams&); }

}  // namespace nvfp4

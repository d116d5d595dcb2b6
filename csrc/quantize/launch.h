// What the CUDA kernels of quantize take; ops/quantize/_cuda.py packs it.
#pragma once
#include "options.h"

namespace nvfp4 {

struct FormLaunch {
    u8* codes;            // [lines, runs, 8], MXFP8 [lines, runs, 16]; lines: rows of x, or its columns for the column form
    u8* scales;           // [lines, runs], MXFP8 [lines, runs / 2]
    float* global_scale;  // [1], or one for each matrix or group; MXFP8: null
    i64 runs;             // of 16 values, from one line to the next
    i64 advance;          // of the noise's offset
    i32 block;            // Block; MXFP8 for both forms or none
    i32 stochastic;
    i32 four_over_six;    // FourOverSix
    i32 hadamard;         // sign mask, or -1
    u32 turn[8];          // its signs, those of values 2k and 2k + 1 as two bf16 have them
};

struct QuantizeLaunch {
    const void* x;
    i64 rows, cols, row_stride;  // in elements; the column stride is 1
    i64 matrix_stride;           // of a stack, whose matrices are the grid's third axis and whose forms lie one behind the other
    u32* amax;                   // bits of fp32: of the values, of the row form's transform, of the column form's; MXFP8: null
    i64 programs;                // amax [matrices, 3, programs], from each block of the pass before; or [3, groups], zeros before
    const u64* noise;            // (seed, offset), or null
    FormLaunch row, col;
    i64 tiles_down;              // of a block
    i64 wide;                    // whether each row of x begins at a multiple of 16 bytes
    // Groups of rows, each a matrix to the column form alone: group e has the rows offsets[e] to offsets[e + 1], and the values
    // from starts[e] on of each of the form's lines. Null for plain tensors and stacks.
    const i64* offsets;
    const i64* starts;
    i64 groups;
    // Which row of x, of `tokens`, each row of the groups is, zeros where there is no such row; null: itself.
    const i64* index;
    i64 tokens;
};

}  // namespace nvfp4

// What the CUDA kernels of quantize take; ops/quantize/_cuda.py packs it.
#pragma once
#include "options.h"

namespace nvfp4 {

struct FormLaunch {
    u8* codes;            // [lines, runs, 8]; lines: rows of x for the row form, columns for the column form
    u8* scales;           // [lines, runs]
    float* global_scale;  // [1]
    i64 advance;          // of the noise's offset
    i32 block;            // Block: none, b1x16 or b16x16
    i32 stochastic;
    i32 four_over_six;    // FourOverSix
    i32 hadamard;         // sign mask, or -1
};

struct QuantizeLaunch {
    const void* x;
    i64 rows, cols, row_stride;  // in elements; the column stride is 1
    u32* amax;                   // [3, programs], bits of fp32: of the values, of the row form's transform, of the column form's
    i64 programs;
    const u64* noise;            // (seed, offset), or null
    FormLaunch row, col;
    i64 tiles_down;              // of a block
    i64 wide;                    // whether each row of x begins at a multiple of 16 bytes
};

}  // namespace nvfp4

// quantize: one matrix to its row form and its column form (the form of its transpose), either or both, in one call.
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
};

struct QuantizeParams {
    const void* x;
    int dtype;                           // 0 fp32, 1 fp16, 2 bf16
    i64 rows, cols;
    i64 row_stride, col_stride;          // in elements
    QuantizeForm row, col;
    int threads;
};

// Return 0, or 1 when memory ran out.
namespace scalar { int quantize(const QuantizeParams&); }
namespace avx2 { int quantize(const QuantizeParams&); }
namespace avx512 { int quantize(const QuantizeParams&); }

}  // namespace nvfp4

// dequantize: codes and scales back to values, value = code * (scale * global_scale), one rounding to the wanted type.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

struct DequantizeParams {
    const u8* codes;            // NVFP4 [rows, 8 ceil(cols / 16)], MXFP8 [rows, 32 ceil(cols / 32)], contiguous
    const u8* scales;           // [rows, ceil(cols / 16)] or [rows, ceil(cols / 32)], contiguous
    const float* global_scale;  // null for MXFP8
    void* out;                  // [rows, cols], contiguous
    int out_dtype;              // 0 fp32, 1 fp16, 2 bf16
    i64 rows, cols;
    int threads;
};

namespace scalar { int dequantize(const DequantizeParams&); }
namespace neon { int dequantize(const DequantizeParams&); }
namespace avx2 { int dequantize(const DequantizeParams&); }
namespace avx512 { int dequantize(const DequantizeParams&); }

}  // namespace nvfp4

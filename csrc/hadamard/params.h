// hadamard: the random Hadamard transform of each run of 16 along the rows of x, zero-padded, as bf16.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

struct HadamardParams {
    const void* x;
    int dtype;  // 0 fp32, 1 fp16, 2 bf16
    i64 rows, cols;
    i64 row_stride, col_stride;  // in elements
    u32 signs;                   // bit i set: sign i is negative
    u16* out;                    // bf16 [rows, ceil16(cols)], contiguous
    int threads;
};

namespace scalar { int hadamard(const HadamardParams&); }
namespace neon { int hadamard(const HadamardParams&); }
namespace avx2 { int hadamard(const HadamardParams&); }
namespace avx512 { int hadamard(const HadamardParams&); }

}  // namespace nvfp4

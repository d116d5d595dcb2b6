// matmul: y [m, n] = (g_a g_b) * sum_k a[m, k] b[n, k] (+ bias), fp32 accumulation, one rounding at the end.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

enum class Kind { fp32, fp16, bf16, fp8, nvfp4, mxfp8 };  // fp8: plain E4M3

struct Operand {
    Kind kind;
    const void* data;           // codes (contiguous rows), or values
    const u8* scales;           // of nvfp4 (E4M3) and mxfp8 (E8M0), rows as far apart; else null
    const float* global_scale;  // of nvfp4 and fp8, else null
    i64 rows, cols;             // cols as stored: padded to whole blocks when quantized; values beyond count as zero
    // In values. Blocks of nvfp4 and mxfp8 lie along the columns, rows whole blocks apart; or, where the row stride is 1, along the
    // rows, which are then as many as stored.
    i64 row_stride, col_stride;
    const i64* row_index = nullptr;  // [rows]: which stored row each row is; null: itself
    const i64* col_index = nullptr;  // [cols]: alike; of plain operands whose rows lie side by side and whose columns do not
};

// What a grouped product makes of its sums beside the result: of h, the result as it is rounded, relu2(h); or of sums d the
// gradient of relu2(h), which is then the result, with that of the weights.
struct Squares {
    const void* h;         // null: forward. Backward [m, n] of the result's type, contiguous
    void* made;            // relu2(h) * weights, as h, or null
    const float* weights;  // [m] or null: one
    float* sums;           // [m, ceil(n / 16)] or null: relu(h)^2 d, summed over each sixteen columns of a row
    u32* amax;             // [16] or null: lane by lane the bits of the largest magnitude of what is made, backward of the result
    float* turned;         // [16] or null: the same, as a number, of its transform along each sixteen rows, zeros below the last
    u32 signs;             // of the transform
};

struct MatmulParams {
    Operand a, b;
    const void* bias;  // [n] or null
    int bias_dtype;    // 0 fp32, 1 fp16, 2 bf16
    void* out;         // [m, n], contiguous
    int out_dtype;
    bool accumulate;   // add to out, which is fp32
    bool relu2;        // of the sum, with its bias: max(y, 0)^2
    int threads;
    const Squares* squares = nullptr;
};

// Return 0, or 1 when memory ran out.
namespace scalar { int matmul(const MatmulParams&); }
namespace neon { int matmul(const MatmulParams&); }
namespace avx2 { int matmul(const MatmulParams&); }
namespace avx512 { int matmul(const MatmulParams&); }
namespace avx512bf16 { int matmul(const MatmulParams&); }

}  // namespace nvfp4

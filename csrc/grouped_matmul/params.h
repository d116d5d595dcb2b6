// grouped_matmul: a matmul for each group of neighbouring rows, in one call. Group e has the rows offsets[e] .. offsets[e + 1].
//   rows divided:  y[rows of e] = a[rows of e] b[e]^T      a [rows, k], b [groups, n, k], y [rows, n]
//   sums divided:  y[e] = a[:, rows of e] b[:, rows of e]^T    a [m, rows], b [n, rows], y [groups, m, n]
// Of a quantized operand of divided sums each group begins with a block of its own, at its starts[e].
// The rows may be gathered as they are read: where rows are divided a's by row_index, where sums are divided b's by col_index.
#pragma once
#include "matmul/params.h"

namespace nvfp4 {

struct GroupedMatmulParams {
    // Rows divided: a.rows counts all groups', a has one global scale, b is the first group's matrix and has one a group. Sums
    // divided: both have one a group.
    Operand a, b;
    const i64* offsets;  // [groups + 1], ascending from 0
    i64 groups;
    i64 b_stride;        // in values, from b of a group to the next group's
    bool sums;           // which of the two
    void* out;           // contiguous
    int out_dtype;
    bool relu2;
    int threads;
    const i64* a_starts = nullptr;  // [groups + 1], of quantized operands of divided sums
    const i64* b_starts = nullptr;
    const Squares* squares = nullptr;  // rows divided: of all rows, without sums and amax
    float* dweights = nullptr;         // [rows]: relu(h)^2 d summed over each row, its sixteens of columns in order
    u32* amax = nullptr;               // [groups], zero: bits of the largest magnitude of a group's rows, as Squares has it
    float* turned = nullptr;           // [groups], zero, beside amax: the same of the transform along a group's rows
};

// Return 0, 1 when memory ran out, 2 when the offsets do not ascend from 0 to the number of rows, or 3 when an operand's starts
// leave no room for its groups.
namespace scalar { int grouped_matmul(const GroupedMatmulParams&); }
namespace neon { int grouped_matmul(const GroupedMatmulParams&); }
namespace avx2 { int grouped_matmul(const GroupedMatmulParams&); }
namespace avx512 { int grouped_matmul(const GroupedMatmulParams&); }
namespace avx512bf16 { int grouped_matmul(const GroupedMatmulParams&); }

}  // namespace nvfp4

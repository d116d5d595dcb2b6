// grouped_matmul: a matmul for each group of neighbouring rows, in one call. Group e has the rows offsets[e] .. offsets[e + 1].
//   rows divided:  y[rows of e] = a[rows of e] b[e]^T      a [rows, k], b [groups, n, k], y [rows, n]
//   sums divided:  y[e] = a[:, rows of e] b[:, rows of e]^T    a [m, rows], b [n, rows], y [groups, m, n]; plain operands
#pragma once
#include "matmul/params.h"

namespace nvfp4 {

struct GroupedMatmulParams {
    Operand a, b;        // rows divided: a.rows counts all groups', b is the first group's matrix; global_scale one a group
    const i64* offsets;  // [groups + 1], ascending from 0
    i64 groups;
    i64 b_stride;        // in elements, from a plain b of a group to the next group's
    bool sums;           // which of the two
    void* out;           // contiguous
    int out_dtype;
    bool relu2;
    int threads;
};

// Return 0, 1 when memory ran out, or 2 when the offsets do not ascend from 0 to the number of rows.
namespace scalar { int grouped_matmul(const GroupedMatmulParams&); }
namespace avx2 { int grouped_matmul(const GroupedMatmulParams&); }
namespace avx512 { int grouped_matmul(const GroupedMatmulParams&); }
namespace avx512bf16 { int grouped_matmul(const GroupedMatmulParams&); }

}  // namespace nvfp4

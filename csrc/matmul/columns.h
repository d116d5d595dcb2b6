// Columns of a product, which grouped_matmul is made of as well. Only matmul/cpu.cpp has the code: it takes a compiler longer than
// all else of both ops.
#pragma once
#include "cpu/steps.h"
#include "cpu/threads.h"
#include "params.h"

namespace nvfp4 {
namespace NVFP4_ISA {

static inline i64 at_most(i64 a, i64 b) { return a < b ? a : b; }
static inline bool exact_in_bf16(const Operand& x) { return x.kind != Kind::fp32 && x.kind != Kind::fp16; }

static inline float combined_scale(const MatmulParams& p) {
    float g = 1.0f;
    if (p.a.global_scale) g *= *p.a.global_scale;
    if (p.b.global_scale) g *= *p.b.global_scale;
    return g - g == 0.0f ? g : real(U32x1(0x7FC00000u)).v;  // an infinite scale says NaN too
}

// Columns `cols` of all rows of the result, in steps of P. False: memory ran out.
template <class P>
bool multiply_cols(const MatmulParams& p, float g, i64 k, Range cols);

// k = 0: the sum is empty, the result is the bias (or zero), and NaN if a global scale is.
void no_products(const MatmulParams& p, float g, Range cols);

}  // namespace NVFP4_ISA
}  // namespace nvfp4

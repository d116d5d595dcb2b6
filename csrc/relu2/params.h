// relu2: y = max(x, 0)^2 * weights[row], fp32 and one rounding; its derivatives.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

struct Relu2Params {
    const void* x;         // [rows, features], contiguous
    const float* weights;  // [rows] or null: one
    i64 rows, features;
    int dtype;             // of x, y, dy and dx
    void* y;
    const void* dy;
    void* dx;
    float* dweights;  // [rows] or null
    int threads;
};

namespace scalar { int relu2(const Relu2Params&); int relu2_backward(const Relu2Params&); }
namespace neon { int relu2(const Relu2Params&); int relu2_backward(const Relu2Params&); }
namespace avx2 { int relu2(const Relu2Params&); int relu2_backward(const Relu2Params&); }
namespace avx512 { int relu2(const Relu2Params&); int relu2_backward(const Relu2Params&); }

}  // namespace nvfp4

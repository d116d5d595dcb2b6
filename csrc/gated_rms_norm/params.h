// gated_rms_norm: y = weight * u / rms(u) over groups of channels, u = x silu(z); or u = x and the gate behind the norm.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

enum class Gate { none, before_norm, after_norm };

struct GatedRmsNormParams {
    int dtype;  // of x, z, y, dy, dx, dz: 0 fp32, 1 fp16, 2 bf16
    i64 rows, channels;
    i64 group;  // channels that share one mean square; divides them
    Gate gate;
    float eps;
    const void *x, *z;        // z null for Gate::none
    i64 x_stride, z_stride;   // from row to row, in elements; channels are contiguous
    const float* weight;      // [channels]
    void* y;                  // forward; contiguous, as are the gradients
    const void* dy;           // backward
    i64 dy_stride;
    void *dx, *dz;
    float* dweight;
    int threads;
};

namespace scalar {
int gated_rms_norm(const GatedRmsNormParams&);
int gated_rms_norm_backward(const GatedRmsNormParams&);
}
namespace neon {
int gated_rms_norm(const GatedRmsNormParams&);
int gated_rms_norm_backward(const GatedRmsNormParams&);
}
namespace avx2 {
int gated_rms_norm(const GatedRmsNormParams&);
int gated_rms_norm_backward(const GatedRmsNormParams&);
}
namespace avx512 {
int gated_rms_norm(const GatedRmsNormParams&);
int gated_rms_norm_backward(const GatedRmsNormParams&);
}

}  // namespace nvfp4

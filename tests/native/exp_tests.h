// The largest errors of csrc/cpu/exp.h, over every step-th float, in units of the last place; `faded`: the largest magnitude
// of sigmoid or silu below -87.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

struct ExpErrors {
    double exp, softplus, sigmoid, silu, faded;
};

namespace scalar { ExpErrors exp_errors(u32 step); }
namespace neon { ExpErrors exp_errors(u32 step); }
namespace avx2 { ExpErrors exp_errors(u32 step); }
namespace avx512 { ExpErrors exp_errors(u32 step); }

}  // namespace nvfp4

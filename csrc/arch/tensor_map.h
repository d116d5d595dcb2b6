// What the copy engine is told of a matrix in global memory: written on the host, handed over inside a launch's parameters.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

// CUtensorMap, whose contents are the driver's own affair (cuda.h, cuTensorMapEncodeTiled). On the host model: TensorMapModel
// of host_sm100.h. ops/_tensor_map.py makes both.
struct alignas(64) TensorMap {
    u64 words[16];
};

}  // namespace nvfp4

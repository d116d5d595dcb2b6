// What a form of quantize can be; for CPUs and GPUs alike.
#pragma once
#include "numerics/lane.h"

namespace nvfp4 {

enum class Block { none, b1x16, b16x16, b1x32 };  // b1x32 is MXFP8
enum class FourOverSix { off, mae, mse };

}  // namespace nvfp4

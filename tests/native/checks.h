// What the C++ tests count, and how they tell of it.
#pragma once
#include <cstdio>

#include "cpu/isa.h"
#include "numerics/lane.h"

namespace nvfp4 {

inline int failures = 0;

inline void expect(bool ok, const char* what, i64 a = 0, i64 b = 0, i64 c = 0) {
    if (!ok && ++failures <= 20) std::printf("FAILED: %s on %s (%lld, %lld, %lld)\n", what, isa_name(), a, b, c);
}

void norm_and_convolution();  // norm_conv_tests.cpp
void experts_everywhere();    // experts_tests.cpp

}  // namespace nvfp4

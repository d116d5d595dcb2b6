// csrc/cpu/exp.h on one instruction set (compiled once for each, as an op's cpu.cpp), against the C library in fp64: every
// step-th of all floats and each special value and edge.
#include "exp_tests.h"

#include <cmath>
#include <cstring>

#include "cpu/exp.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

// |got - exact| in units of the last place of exact; below the smallest normal number, in the units there.
double ulps(float got, double exact) {
    if (std::isnan(exact) || std::isnan(got)) return std::isnan(exact) && std::isnan(got) ? 0 : HUGE_VAL;
    const double most = std::ldexp(1.0, 128) - std::ldexp(1.0, 103);  // from here on the nearest float is Inf
    if (std::isinf(got)) return std::fabs(exact) >= most * (1 - 2e-7) && (got > 0) == (exact > 0) ? 0 : HUGE_VAL;
    if (std::fabs(exact) >= most) return std::fabs(got) >= float_max * (1 - 2e-7f) && (got > 0) == (exact > 0) ? 0 : HUGE_VAL;
    const int exponent = exact == 0 ? -126 : std::ilogb(exact);
    return std::fabs(got - exact) / std::ldexp(1.0, (exponent < -126 ? -126 : exponent) - 23);
}

double exact_sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

ExpErrors exp_errors(u32 step) {
    ExpErrors worst{};
    float x[16], y[4][16];
    auto check = [&](int count) {
        for (int i = 0; i < 16; i += F::lanes) {
            store(y[0] + i, exp(load(x + i)));
            store(y[1] + i, softplus(load(x + i)));
            store(y[2] + i, sigmoid(load(x + i)));
            store(y[3] + i, silu(load(x + i)));
        }
        for (int i = 0; i < count; ++i) {
            const double v = x[i], e = std::exp(v);
            const double soft = v > 0 ? v + std::log1p(std::exp(-v)) : std::log1p(e);
            worst.exp = std::fmax(worst.exp, ulps(y[0][i], e));
            worst.softplus = std::fmax(worst.softplus, ulps(y[1][i], soft));
            if (v > -87) {  // below, e^-x nears Inf: the result fades to 0
                worst.sigmoid = std::fmax(worst.sigmoid, ulps(y[2][i], exact_sigmoid(v)));
                worst.silu = std::fmax(worst.silu, ulps(y[3][i], v * exact_sigmoid(v)));
            } else if (!std::isinf(v)) {
                worst.faded = std::fmax(worst.faded, std::fmax(std::fabs(y[2][i]), std::fabs(y[3][i])));
            }
        }
    };
    const float edges[16] = {0.0f, -0.0f, 1.0f, -12.0f, 88.72283f, 88.722839f, 88.73f, -87.34f,
                             -103.97f, -103.98f, -104.5f, HUGE_VALF, -HUGE_VALF, std::nanf(""), 1e-45f, -float_max};
    std::memcpy(x, edges, sizeof edges);
    check(16);
    int filled = 0;
    for (u64 i = 0; i < 1ull << 32; i += step) {
        const u32 b = static_cast<u32>(i);
        if ((b & 0x7FFFFFFFu) > 0x43800000u && i % 31) continue;  // beyond 256 all is 0, x, 1 or Inf: fewer of these
        std::memcpy(&x[filled++], &b, 4);
        if (filled == 16) check(16), filled = 0;
    }
    if (filled) check(filled);
    return worst;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

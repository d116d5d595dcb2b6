// MXFP8 (OCP Microscaling Formats v1.0): E4M3 codes, one E8M0 scale (a power of two) for 32 values. The scale is rounded up,
// the smallest 2^e with amax <= 448 * 2^e, so that nothing saturates ("Recipes for Pre-training LLMs with MXFP8").
#pragma once
#include "e4m3.h"

namespace nvfp4 {

constexpr u32 e8m0_nan = 255;

// Stored exponent e + 127 for a finite block amax; 0 for amax 0. 448 = 1.75 * 2^8.
template <class F>
NVFP4_HD typename F::Word e8m0_encode(F amax) {
    using U = typename F::Word;
    const U b = bits(amax);
    const U up = select(less_int(U(0x600000u), b & U(0x7FFFFFu)), U(1u), U(0u));
    const U e = (b >> 23) + up;
    return select(less_int(e, U(8u)), U(0u), e - U(8u));
}

// 2^-e of a stored exponent up to 253 (amax reaches 247): exact, never subnormal.
template <class F>
NVFP4_HD F e8m0_inverse(typename F::Word scale) {
    return real((typename F::Word(254u) - scale) << 23);
}

// 2^e; 0 gives the subnormal 2^-127, 255 NaN.
template <class F>
NVFP4_HD F e8m0_decode(typename F::Word scale) {
    using U = typename F::Word;
    const F value = select(equal(scale, U(0u)), real(U(0x00400000u)), real(scale << 23));
    return select(equal(scale, U(e8m0_nan)), real(U(0x7FC00000u)), value);
}

}  // namespace nvfp4

// E2M1: sign in bit 3, two exponent bits, one mantissa bit. Magnitudes 0 .5 1 1.5 2 3 4 6 by the low three bits.
#pragma once
#include "lane.h"

namespace nvfp4 {

// Exponent field (127, 128, 129) of the binade a magnitude <= 6 lies in; below 1 the step is that of [1, 2).
template <class F>
NVFP4_HD typename F::Word e2m1_binade(F m) {
    return bits(greatest(m, F(1.0f))) >> 23;
}

// Sign bit as hardware keeps it: -0.0 is code 8.
template <class F>
NVFP4_HD typename F::Word e2m1_sign(F q) {
    return (bits(q) >> 28) & typename F::Word(8u);
}

// Code of q rounded to nearest, ties to the even code, saturating at 6. q must not be NaN.
// n = round(m / step) counts steps of .5, 1 or 2; a binade begins at n = 2, hence n + 2 * (binade - 127).
template <class F>
NVFP4_HD typename F::Word e2m1_nearest(F q) {
    using U = typename F::Word;
    const F m = least(magnitude(q), F(6.0f));
    const U e = e2m1_binade(m);
    const F per_step = real((U(255u) - e) << 23);
    return (round_int(m * per_step) + (e << 1) - U(254u)) | e2m1_sign(q);
}

// Code of q rounded up in magnitude iff r + floor(256 f) >= 256, f the distance to the grid value below in steps; r < 256.
template <class F>
NVFP4_HD typename F::Word e2m1_stochastic(F q, typename F::Word r) {
    using U = typename F::Word;
    const F m = least(magnitude(q), F(6.0f));
    const U e = e2m1_binade(m);
    const F per_step = real((U(263u) - e) << 23);  // 256 / step
    return (((trunc_int(m * per_step) + r) >> 8) + (e << 1) - U(254u)) | e2m1_sign(q);
}

// Value of a code 0..15.
template <class F>
NVFP4_HD F e2m1_decode(typename F::Word code) {
    using U = typename F::Word;
    const U m = code & U(7u);
    const F normal = real((m << 22) + U(126u << 23));
    const F value = select(less_int(m, U(2u)), to_float(m) * F(0.5f), normal);
    return real(bits(value) | ((code & U(8u)) << 28));
}

}  // namespace nvfp4

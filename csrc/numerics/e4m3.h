// E4M3 (fn): bias 7, three mantissa bits, no infinity, 0x7F and 0xFF are NaN, largest value 448.
#pragma once
#include "lane.h"

namespace nvfp4 {

// Code of a magnitude (>= 0, not NaN), to nearest even, saturating at 448. Below 2^-6 the step stays 2^-9.
template <class F>
NVFP4_HD typename F::Word e4m3_encode_magnitude(F m) {
    using U = typename F::Word;
    m = least(m, F(448.0f));
    const U e = bits(greatest(m, F(0.015625f))) >> 23;
    const F per_step = real((U(257u) - e) << 23);
    return round_int(m * per_step) + (e << 3) - U(121u << 3);
}

template <class F>
NVFP4_HD typename F::Word e4m3_encode(F x) {
    return e4m3_encode_magnitude(magnitude(x)) | ((bits(x) >> 24) & typename F::Word(0x80u));
}

// Value of a code known to be no NaN and not negative (every scale this library writes).
template <class F>
NVFP4_HD F e4m3_decode_magnitude(typename F::Word code) {
    using U = typename F::Word;
    const F normal = real((code << 20) + U(120u << 23));
    return select(less_int(code, U(8u)), to_float(code) * F(0.001953125f), normal);
}

template <class F>
NVFP4_HD F e4m3_decode(typename F::Word code) {
    using U = typename F::Word;
    const U m = code & U(0x7Fu);
    const F value = select(equal(m, U(0x7Fu)), real(U(0x7FC00000u)), e4m3_decode_magnitude<F>(m));
    return real(bits(value) | ((code & U(0x80u)) << 24));
}

}  // namespace nvfp4

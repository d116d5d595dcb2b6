// Random Hadamard transform of one run of 16: x' = x @ (S H16 / 4), fp32, rounded to bf16.
#pragma once
#include "lane.h"

namespace nvfp4 {

// To the nearest bf16 value, ties to even; beyond the largest finite value that value, infinities too; NaN stays NaN.
template <class F>
NVFP4_HD F round_bf16_saturating(F x) {
    using U = typename F::Word;
    const F bound(3.38953139e38f);
    const U b = bits(least(bound, greatest(F(0.0f) - bound, x)));  // in this order a NaN in x comes through
    const U rounded = (b + U(0x7FFFu) + ((b >> 16) & U(1u))) & U(0xFFFF0000u);
    // a NaN with a full payload would carry into the sign
    return real(select(less_int(U(0x7F800000u), b & U(0x7FFFFFFFu)), U(0x7FC00000u), rounded));
}

template <int stride, class F>
NVFP4_HD void butterflies(F* v) {
    NVFP4_UNROLL
    for (int i = 0; i < 16; ++i) {
        if ((i & stride) == 0) {
            const F a = v[i], b = v[i + stride];
            v[i] = a + b;
            v[i + stride] = a - b;
        }
    }
}

// In place, v[i] the i-th element. The factor 1/16 comes first and 4 last, both exact, so that no sum overflows; the order of
// the butterflies (strides 1, 2, 4, 8) is part of the contract, so every backend rounds alike.
template <class F>
NVFP4_HD void hadamard16(F* v, u32 signs) {
    using U = typename F::Word;
    NVFP4_UNROLL
    for (int i = 0; i < 16; ++i) v[i] = real(bits(v[i] * F(0.0625f)) ^ U((signs >> i & 1u) << 31));
    butterflies<1>(v);
    butterflies<2>(v);
    butterflies<4>(v);
    butterflies<8>(v);
    NVFP4_UNROLL
    for (int i = 0; i < 16; ++i) v[i] = round_bf16_saturating(v[i] * F(4.0f));
}

}  // namespace nvfp4

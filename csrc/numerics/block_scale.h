// The scales of NVFP4, fp32 in exactly this order: other orders flip 3e-4 to 1e-3 of the scale bytes.
// Source: "Pretraining LLMs with NVFP4", appendix B, in the order public implementations have used since 2026-03.
#pragma once
#include "e2m1.h"
#include "e4m3.h"

namespace nvfp4 {

// What a tensor's amax determines. e4m3_max is 448, or 256 under four_over_six.
struct TensorScale {
    float amax;
    float g_enc;   // encode scale
    float g_dec;   // 1 / g_enc, stored as global_scale
    float k;       // g_enc / 6: block amax to block scale
    float denom;   // 6 * e4m3_max
};

NVFP4_HD TensorScale tensor_scale(float amax, float e4m3_max) {
    TensorScale s;
    s.amax = amax;
    s.denom = 6.0f * e4m3_max;
    s.g_enc = amax == 0.0f ? 1.0f : least(F32x1(s.denom) / F32x1(amax), F32x1(float_max)).v;
    s.g_dec = (F32x1(1.0f) / F32x1(s.g_enc)).v;
    s.k = (F32x1(s.g_enc) * F32x1(1.0f / 6.0f)).v;
    return s;
}

// E4M3 code of the decode scale of a block whose largest magnitude is amax.
template <class F>
NVFP4_HD typename F::Word block_scale(F amax, const TensorScale& s) {
    return e4m3_encode_magnitude(amax * F(s.k));
}

// What the block's values are multiplied by; a scale of zero gives FLT_MAX.
template <class F>
NVFP4_HD F block_encode(typename F::Word scale, const TensorScale& s) {
    return least(F(1.0f) / (e4m3_decode_magnitude<F>(scale) * F(s.g_dec)), F(float_max));
}

// four_over_six: the two candidates, the block's amax mapped to 6 or to 4.
template <class F>
NVFP4_HD void block_scale_candidates(F amax, const TensorScale& s, typename F::Word& six, typename F::Word& four) {
    const F base = amax / F(6.0f) * F(s.g_enc);
    six = e4m3_encode_magnitude(base);
    four = e4m3_encode_magnitude(base * F(1.5f));
}

// Signed error of x under a candidate, in the input's units. Decoded as code * scale * amax / denom, left to right:
// with any other order exact ties between the candidates fall the other way in about 1 of 10,000 blocks.
template <class F>
NVFP4_HD F block_error(F x, F scale, F enc, const TensorScale& s) {
    const F decoded = e2m1_decode<F>(e2m1_nearest(x * enc));
    return decoded * scale * F(s.amax) / F(s.denom) - x;
}

}  // namespace nvfp4

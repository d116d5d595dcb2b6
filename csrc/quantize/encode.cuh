// From blocks of 16 values to their codes and scales. Blocks outside the matrix are zeros and take part: the lanes of a warp stay
// together.
#pragma once
#include "numerics/block_scale.h"
#include "numerics/hadamard.h"
#include "numerics/mxfp8.h"
#include "numerics/philox.h"
#include "tiles.cuh"

namespace nvfp4 {

// What a kernel knows of a form when it is compiled.
enum Known { absent = 0, present = 1, tiles16 = 2, stochastic = 4, rotated = 8, anything = 16 };

constexpr float bf16_max = 3.38953139e38f;

template <int known>
struct Options {
    const FormLaunch& f;
    static constexpr bool any = (known & anything) != 0;
    __device__ __forceinline__ bool is_present() const { return any ? f.block != 0 : known != absent; }
    __device__ __forceinline__ bool is_tiled() const { return any ? f.block == static_cast<i32>(Block::b16x16) : (known & tiles16) != 0; }
    __device__ __forceinline__ bool is_stochastic() const { return any ? f.stochastic != 0 : (known & stochastic) != 0; }
    __device__ __forceinline__ bool is_rotated() const { return any ? f.hadamard >= 0 : (known & rotated) != 0; }
    __device__ __forceinline__ bool chooses() const { return any && f.four_over_six != 0; }
};

// What follows from a block's scale, by its code, worked out once a thread block: what values are multiplied by, and twice a bf16
// whose product with it lies between 5 and 7: magnitudes beyond have the same code, without stochastic rounding.
struct alignas(8) Factor {
    float enc;
    u32 bound;
};
using Factors = Factor[tile_threads];  // 126 scales are written; a barrier comes before they are read

static __device__ __forceinline__ void put_factors(const TensorScale& s, Factors& factors) {
    const F32x1 enc = block_encode<F32x1>(U32x1(threadIdx.x), s);
    const float bound = (F32x1(6.0f) / enc).v;
    factors[threadIdx.x] = {enc.v, pack_bf16(bound, bound)};
}

// Values 2k and 2k + 1.
template <class T>
static __device__ __forceinline__ Pair pair_of(const Run<T>& x, int k) {
    F32x1 v[2];
    T::widen(x.word[T::in_word == 2 ? k : 2 * k], v);
    if (T::in_word == 1) T::widen(x.word[2 * k + 1], v + 1);
    return {v[0].v, v[1].v};
}

// The signs of values 8 * half to 8 * half + 7 as those of codes.
template <class T>
static __device__ __forceinline__ u32 signs_of(const Run<T>& x, int half) {
    u32 even, odd;  // a byte of them for each value
    if constexpr (T::in_word == 2) {
        const u32* w = x.word + 4 * half;
        const u32 first = bytes_of<0xFBD9u>(w[0], w[1]), second = bytes_of<0xFBD9u>(w[2], w[3]);  // values 0, 2, 1, 3 of four
        even = bytes_of<0x5410u>(first, second);
        odd = bytes_of<0x7632u>(first, second);
    } else {
        const u32* w = x.word + 8 * half;
        even = bytes_of<0x5410u>(bytes_of<0x00FBu>(w[0], w[2]), bytes_of<0x00FBu>(w[4], w[6]));
        odd = bytes_of<0x5410u>(bytes_of<0x00FBu>(w[1], w[3]), bytes_of<0x00FBu>(w[5], w[7]));
    }
    return (even & 0x08080808u) | (odd & 0x80808080u);
}

template <class T>
static __device__ __forceinline__ F32x1 largest_of(const Run<T>& x) {
    u32 most = 0;
    NVFP4_UNROLL
    for (int k = 0; k < Run<T>::words; ++k) most = T::larger(most, x.word[k]);
    return real(U32x1(T::largest(most)));
}

// The magnitudes, no larger than 6.
static __device__ __forceinline__ Pair at_most_6(Pair v) { return {fminf(fabsf(v.x), 6.0f), fminf(fabsf(v.y), 6.0f)}; }

struct Codes {
    u32 word[2];  // the first value in the lowest bits
};

template <class T>
static __device__ __forceinline__ Codes nearest(const Run<T>& x, const Factor& f) {
    Codes out;
    const Pair enc = {f.enc, f.enc};
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) {
        Pair v[4];
#if defined(NVFP4_CONVERTS_TO_E2M1)
        NVFP4_UNROLL
        for (int k = 0; k < 4; ++k) v[k] = pair_of(x, 4 * half + k) * enc;
        out.word[half] = e2m1_word(v);
#else
        NVFP4_UNROLL
        for (int k = 0; k < 4; ++k) {
            if constexpr (T::is_bf16) {
                const Run<T> bounded = {{bounded_bf16x2(x.word[4 * half + k], f.bound)}};
                v[k] = pair_of(bounded, 0) * enc;
            } else {
                v[k] = at_most_6(pair_of(x, 4 * half + k) * enc);
            }
        }
        out.word[half] = e2m1_magnitudes(v) | signs_of(x, half);
#endif
    }
    return out;
}

// Words of two draws, so that the keys of both are worked out once.
struct Words {
    U32x1 a, b;
    Words() = default;
    NVFP4_HD_MEMBER Words(u32 both) : a(both), b(both) {}
    NVFP4_HD_MEMBER Words(u32 a, u32 b) : a(a), b(b) {}
};
NVFP4_HD Words operator^(Words x, Words y) { return {(x.a ^ y.a).v, (x.b ^ y.b).v}; }
NVFP4_HD Words multiply_wide(Words x, u32 m, Words& high) {
    const U32x1 a = multiply_wide(x.a, m, high.a), b = multiply_wide(x.b, m, high.b);
    return {a.v, b.v};
}

// The noise of two blocks, by their numbers in the form, row-major (the Philox counter).
template <int known>
static __device__ __forceinline__ void draw(Options<known> o, u64 first, u64 second, u64 offset, u64 seed, u32 (&noise)[2][4]) {
    if (!o.is_stochastic()) return;
    const Words low(static_cast<u32>(first), static_cast<u32>(second));
    const Words high(static_cast<u32>(first >> 32), static_cast<u32>(second >> 32));
    const Draw<Words> drawn = philox(low, high, offset, seed);
    NVFP4_UNROLL
    for (int w = 0; w < 4; ++w) {
        noise[0][w] = drawn.word[w].a.v;
        noise[1][w] = drawn.word[w].b.v;
    }
}

template <class T>
static __device__ __forceinline__ Codes stochastically(const Run<T>& x, const Factor& f, const u32 (&noise)[4]) {
    Codes out;
    const Pair enc = {f.enc, f.enc};
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) {
        Pair v[4];
        NVFP4_UNROLL
        for (int k = 0; k < 4; ++k) v[k] = at_most_6(pair_of(x, 4 * half + k) * enc);
        out.word[half] = e2m1_stochastic_magnitudes(v, noise[2 * half], noise[2 * half + 1]) | signs_of(x, half);
    }
    return out;
}

template <int known, class T>
static __device__ __forceinline__ Codes encode(Options<known> o, const Run<T>& x, const Factor& f, const u32 (&noise)[4]) {
    return o.is_stochastic() ? stochastically(x, f, noise) : nearest(x, f);
}

// Transforms of two blocks at a time, but for the last butterflies, each value times 4 * factor (numerics/hadamard.h). turn: the
// signs of two values a word, as bf16 has them. A sixteenth of a value of 16 bits is exact in fp32, so that it may be fused.
template <class T>
static __device__ __forceinline__ void turned(const Run<T> (&x)[2], const u32* turn, float factor, Pair (&v)[16]) {
    const Pair plus = {factor, factor}, minus = {-factor, -factor};
    NVFP4_UNROLL
    for (int k = 0; k < 8; ++k) {
        F32x1 w[2][2];  // [block][value]
        NVFP4_UNROLL
        for (int i = 0; i < 2; ++i) {
            if constexpr (T::in_word == 2) {
                T::widen(x[i].word[k] ^ turn[k], w[i]);
            } else {
                w[i][0] = real(U32x1(x[i].word[2 * k] ^ turn[k] << 16));
                w[i][1] = real(U32x1(x[i].word[2 * k + 1] ^ (turn[k] & 0xFFFF0000u)));
            }
        }
        const Pair a = Pair{w[0][0].v, w[1][0].v} * plus, b = {w[0][1].v, w[1][1].v};
        v[2 * k] = T::in_word == 2 ? fused(b, plus, a) : a + b * plus;
        v[2 * k + 1] = T::in_word == 2 ? fused(b, minus, a) : a - b * plus;
    }
    butterflies<2>(v);
    butterflies<4>(v);
}

// The transforms, rounded to bf16, of the blocks that `load` gets. Times a quarter nothing is left to multiply, but sums of values
// near the end of fp32's range may overflow: then they are times a sixteenth, once more, as those of fp32 values are at once.
template <class T, class Load>
static __device__ __forceinline__ void rotate(Load load, const FormLaunch& f, Run<Brain> (&out)[2]) {
    for (float factor = T::in_word == 2 ? 0.25f : 0.0625f;;) {
        Run<T> x[2];
        load(x);
        Pair v[16];
        turned(x, f.turn, factor, v);
        butterflies<8>(v);
        const bool last = factor == 0.0625f;
        if (last) {
            const auto quadruple = [](float x) { return fminf(fmaxf((F32x1(x) * F32x1(4.0f)).v, -bf16_max), bf16_max); };
            NVFP4_UNROLL
            for (int j = 0; j < 16; ++j) v[j] = {quadruple(v[j].x), quadruple(v[j].y)};
        }
        NVFP4_UNROLL
        for (int k = 0; k < 8; ++k) {
            out[0].word[k] = pack_bf16(v[2 * k].x, v[2 * k + 1].x);
            out[1].word[k] = pack_bf16(v[2 * k].y, v[2 * k + 1].y);
        }
        const F32x1 most(fmaxf(largest_of(out[0]).v, largest_of(out[1]).v));
        if (last || __ballot_sync(all_lanes, !(most.v <= bf16_max)) == 0) return;
        factor = 0.0625f;
    }
}

// The largest magnitude among the transforms and `most`, a quarter of both and not rounded, which is monotone: of a + b and a - b
// it is |a| + |b|.
template <class T>
static __device__ __forceinline__ float largest_turned(const Run<T> (&x)[2], const FormLaunch& f, float most) {
    Pair v[16];
    turned(x, f.turn, 0.0625f, v);
    NVFP4_UNROLL
    for (int j = 0; j < 8; ++j) {
        most = fmaxf(most, (F32x1(fabsf(v[j].x)) + F32x1(fabsf(v[j + 8].x))).v);
        most = fmaxf(most, (F32x1(fabsf(v[j].y)) + F32x1(fabsf(v[j + 8].y))).v);
    }
    return most;
}

// Of the lanes whose numbers differ in the bits of `lanes` alone.
template <int lanes>
static __device__ __forceinline__ F32x1 lanes_largest(F32x1 x) {
    NVFP4_UNROLL
    for (int d = 1; d < 32; d *= 2) {
        if (lanes & d) x = F32x1(fmaxf(x.v, __shfl_xor_sync(all_lanes, x.v, d)));
    }
    return x;
}

// The sum of a 16x16 tile's errors, its lines in order (tiles.cuh has the lanes that hold them).
template <bool columns>
static __device__ __forceinline__ void tile_sum(F32x1 (&error)[2]) {
    F32x1 total[2] = {F32x1(0.0f), F32x1(0.0f)};
    NVFP4_UNROLL
    for (int line = 0; line < 16; ++line) {
        if (columns) {
            const int from = (lane_index() & 2) | line >> 3 | (line & 7) << 2;
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) total[half] = total[half] + F32x1(__shfl_sync(all_lanes, error[half].v, from));
        } else {
            total[0] = total[0] + F32x1(__shfl_sync(all_lanes, error[line >> 3].v, (lane_index() & 24) | (line & 7)));
        }
    }
    error[0] = total[0];
    error[1] = total[columns ? 1 : 0];
}

// Which of the two candidates each block takes (numerics/block_scale.h); a 16x16 tile chooses as one. Loops are kept: the errors of
// two blocks under two candidates, one after another, are most of the code of a kernel with every option.
template <bool columns, class T>
static __device__ __forceinline__ void choose_scales(const FormLaunch& f, bool tiled, const TensorScale& s, const Factors& factors,
                                                     const Run<T> (&x)[2], const F32x1* amax, u32 (&scale)[2]) {
    U32x1 six[2], four[2];
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) block_scale_candidates(amax[half], s, six[half], four[half]);
    F32x1 of_six[2];
    NVFP4_KEEP_LOOP
    for (int c = 0; c < 2; ++c) {
        F32x1 error[2] = {F32x1(0.0f), F32x1(0.0f)};
        NVFP4_KEEP_LOOP
        for (int half = 0; half < 2; ++half) {
            const u32 candidate = c ? (half ? four[1].v : four[0].v) : half ? six[1].v : six[0].v;
            const F32x1 decode = e4m3_decode_magnitude<F32x1>(candidate), enc(factors[candidate].enc);
            const auto add = [&](F32x1 sum, float v) {
                const F32x1 e = block_error(F32x1(v), decode, enc, s);
                return sum + (f.four_over_six == static_cast<i32>(FourOverSix::mae) ? magnitude(e) : e * e);
            };
            Run<T> block;
            NVFP4_UNROLL
            for (int k = 0; k < Run<T>::words; ++k) block.word[k] = half ? x[1].word[k] : x[0].word[k];
            F32x1 sum(0.0f);
            NVFP4_UNROLL
            for (int k = 0; k < 8; ++k) {
                const Pair v = pair_of(block, k);
                sum = add(add(sum, v.x), v.y);
            }
            error[0] = half ? error[0] : sum;
            error[1] = sum;
        }
        if (tiled) tile_sum<columns>(error);
        NVFP4_UNROLL
        for (int half = 0; half < 2; ++half) {
            if (c == 0) of_six[half] = error[half];
            else scale[half] = (less(error[half], of_six[half]) ? four[half] : six[half]).v;
        }
    }
}

// Codes of the scales of a thread's two blocks.
template <int known, bool columns, class T>
static __device__ __forceinline__ void scales_of(Options<known> o, const TensorScale& s, const Factors& factors, const Run<T> (&x)[2],
                                                 u32 (&scale)[2]) {
    F32x1 amax[2] = {largest_of(x[0]), largest_of(x[1])};
    if (o.is_tiled() && columns) {
        NVFP4_UNROLL
        for (int half = 0; half < 2; ++half) amax[half] = lanes_largest<29>(amax[half]);
    } else if (o.is_tiled()) {
        amax[0] = amax[1] = lanes_largest<7>(F32x1(fmaxf(amax[0].v, amax[1].v)));
    }
    if (o.chooses()) {
        choose_scales<columns>(o.f, o.is_tiled(), s, factors, x, amax, scale);
        return;
    }
    scale[0] = e4m3_magnitude(amax[0] * F32x1(s.k));
    scale[1] = o.is_tiled() && !columns ? scale[0] : e4m3_magnitude(amax[1] * F32x1(s.k));
}

struct Bytes {
    u32 word[4];
    u32 scale;
};

// MXFP8. most: of a block of 32 values, of which another thread has half, the largest magnitude, as bits of fp32.
template <class T>
static __device__ __forceinline__ Bytes encode_mxfp8(const Run<T>& x, u32 most) {
    const bool finite = most < 0x7F800000u;
    const U32x1 exponent = e8m0_encode(real(U32x1(finite ? most : 0u)));
    const float factor = e8m0_inverse<F32x1>(exponent).v;
    const Pair inverse = {factor, factor};
    Bytes out;
    out.scale = finite ? exponent.v : e8m0_nan;
    NVFP4_UNROLL
    for (int w = 0; w < 4; ++w) {
        const u32 word = e4m3_word(pair_of(x, 2 * w) * inverse, pair_of(x, 2 * w + 1) * inverse);
        out.word[w] = finite ? word : 0u;
    }
    return out;
}

}  // namespace nvfp4

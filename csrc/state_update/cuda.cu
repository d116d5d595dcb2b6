// state_update on GPUs: the states through registers once, all tokens on the way; their bytes are all that takes time.
//
// Eight lanes hold a row of a state, in vectors of 16 bytes that alternate between them: a warp's load is four rows' 128
// bytes each, and the sum over a row takes three exchanges. A thread has two rows (of long ones and with noise one), so that up
// to eight loads are on their way at once. B and C come through shared memory, in fp32, for all the rows of the block.
// Products are not contracted into sums: one launch with several tokens gives the bits of several launches, and the bits that
// noise rounds are those of the reference's formula.
#include "arch/values.cuh"
#include "launch.h"
#include "numerics/philox.h"

namespace nvfp4 {

constexpr int update_threads = 128, row_lanes = 8;

static __device__ __forceinline__ F32x1 input(const InputLaunch& v, i64 at) {
    if (v.dtype == 0) return F32x1(static_cast<const float*>(v.data)[at]);
    const u16 raw = static_cast<const u16*>(v.data)[at];
    return v.dtype == 1 ? widen_one<Half>(raw) : widen_one<Brain>(raw);
}
static __device__ __forceinline__ i64 place(const InputLaunch& v, i64 row, i64 token, i64 head) {
    return row * v.row_stride + token * v.token_stride + head * v.head_stride;
}

// To the state's dtype and back: to nearest, or |x| plus r / 2^16 units of the last place, cut off. NaN and Inf stay.
static __device__ __forceinline__ bool is_finite(F32x1 x) { return (bits(x).v & 0x7F800000u) != 0x7F800000u; }
static __device__ __forceinline__ u32 rounded(F32x1 x, bool noisy, u32 r, Brain) {
    return noisy && is_finite(x) ? (bits(x).v + r) >> 16 : Brain::narrow(x.v);
}
static __device__ __forceinline__ u32 rounded(F32x1 x, bool noisy, u32 r, Half) {
    if (noisy && is_finite(x)) {
        const F32x1 size = magnitude(x);
        const u32 sign = bits(x).v & 0x80000000u;
        if (less(size, F32x1(6.103515625e-5f))) {  // below 2^-14 the last place is 2^-24, whatever the exponent
            const F32x1 units = size * F32x1(16777216.0f) + to_float(U32x1(r)) * F32x1(1.52587890625e-5f);
            x = real(bits(to_float(trunc_int(units)) * F32x1(5.9604644775390625e-8f)) | U32x1(sign));
        } else {
            x = real(U32x1((bits(x).v + (r >> 3)) >> 13 << 13));
        }
    }
    return Half::narrow(x.v);
}

// A thread's part of one row: value `i` of vector `n` is element (8 n + lane) * per + i, of `per` in 16 bytes.
template <class S, int vectors>
struct Row {
    static constexpr int per = 16 / sizeof(typename S::Raw);
    F32x1 v[vectors][per];

    static __device__ __forceinline__ int element(int n) { return (n * row_lanes + (lane_index() & (row_lanes - 1))) * per; }

    __device__ __forceinline__ void load(const typename S::Raw* from, int count, bool wide) {
        NVFP4_UNROLL
        for (int n = 0; n < vectors; ++n) {
            const int at = element(n);
            if (wide) {
                u32 w[4] = {0, 0, 0, 0};
                if (at < count) {
                    const Chunk c = *reinterpret_cast<const Chunk*>(from + at);
                    w[0] = c.x, w[1] = c.y, w[2] = c.z, w[3] = c.w;
                }
                NVFP4_UNROLL
                for (int i = 0; i < 4; ++i) S::widen(w[i], v[n] + i * S::in_word);
            } else {
                NVFP4_UNROLL
                for (int i = 0; i < per; ++i) v[n][i] = at + i < count ? widen_one<S>(from[at + i]) : F32x1(0.0f);
            }
        }
    }

    __device__ __forceinline__ void store(typename S::Raw* to, int count, bool wide) const {
        NVFP4_UNROLL
        for (int n = 0; n < vectors; ++n) {
            const int at = element(n);
            if (wide) {
                u32 w[4];
                NVFP4_UNROLL
                for (int i = 0; i < 4; ++i) {
                    w[i] = S::narrow(v[n][i * S::in_word].v);
                    if (S::in_word == 2) w[i] |= S::narrow(v[n][i * S::in_word + S::in_word - 1].v) << 16;
                }
                if (at < count) *reinterpret_cast<Chunk*>(to + at) = {w[0], w[1], w[2], w[3]};
            } else {
                NVFP4_UNROLL
                for (int i = 0; i < per; ++i) {
                    if (at + i < count) to[at + i] = static_cast<typename S::Raw>(S::narrow(v[n][i].v));
                }
            }
        }
    }

    // Rounds to the state's dtype; `first`: the flat index of the row's first element among those of all rows. Element e takes
    // the halfword e % 8 of draw e / 8.
    template <bool noisy>
    __device__ __forceinline__ void round(const u64* noise, u64 token, u64 first, int count) {
        NVFP4_UNROLL
        for (int n = 0; n < vectors; ++n) {
            u32 r[per] = {};
            if (noisy) noise_of(noise[0], noise[1] + token, first + static_cast<u64>(element(n)), count % 8 == 0, r);
            NVFP4_UNROLL
            for (int i = 0; i < per; ++i) v[n][i] = widen_one<S>(static_cast<typename S::Raw>(rounded(v[n][i], noisy, r[i], S())));
        }
    }

    static __device__ __forceinline__ void noise_of(u64 seed, u64 offset, u64 at, bool whole, u32 (&r)[per]) {
        const auto draw = [&](u64 d) { return philox(U32x1(static_cast<u32>(d)), U32x1(static_cast<u32>(d >> 32)), offset, seed); };
        const Draw<U32x1> drawn = draw(at / 8);
        u32 words[8];  // eight elements that begin anywhere take from two draws
        NVFP4_UNROLL
        for (int w = 0; w < 4; ++w) words[w] = words[w + 4] = drawn.word[w].v;
        if (!whole) {
            const Draw<U32x1> next = draw(at / 8 + 1);
            NVFP4_UNROLL
            for (int w = 0; w < 4; ++w) words[w + 4] = next.word[w].v;
        }
        const u32 shift = whole ? 0 : static_cast<u32>(at % 8);  // in halfwords
        NVFP4_UNROLL
        for (int w = 0; w < 6; ++w) words[w] = shift & 4 ? words[w + 2] : words[w];
        NVFP4_UNROLL
        for (int w = 0; w < 5; ++w) words[w] = shift & 2 ? words[w + 1] : words[w];
        NVFP4_UNROLL
        for (int w = 0; w < 4; ++w) words[w] = shift & 1 ? words[w] >> 16 | words[w + 1] << 16 : words[w];
        NVFP4_UNROLL
        for (int i = 0; i < per; ++i) r[i] = words[i / 2] >> (16 * (i % 2)) & 0xFFFFu;
    }
};

// dt after its bias, softplus and limits; a NaN stays.
static __device__ __forceinline__ float time_step(const StateUpdateLaunch& p, i64 row, i64 token, i64 head) {
    float step = input(p.dt, place(p.dt, row, token, head)).v;
    if (p.dt_bias) step = (F32x1(step) + F32x1(p.dt_bias[head])).v;
    if (p.dt_softplus) step = (step > 0.0f || step != step ? step : 0.0f) + log1pf(expf(-fabsf(step)));
    return step < p.low ? p.low : step > p.high ? p.high : step;
}

static __device__ __forceinline__ void store_y(const StateUpdateLaunch& p, i64 at, float y) {
    if (p.x.dtype == 0) {
        static_cast<float*>(p.y)[at] = y;
    } else {
        static_cast<u16*>(p.y)[at] = static_cast<u16>(p.x.dtype == 1 ? Half::narrow(y) : Brain::narrow(y));
    }
}

template <class S, int vectors, bool noisy>
static __device__ __forceinline__ void update(const StateUpdateLaunch& p) {
    using Raw = typename S::Raw;
    constexpr int rows_a_thread = noisy || vectors * 16 / sizeof(Raw) > 16 ? 1 : 2;
    constexpr int block_channels = update_threads / row_lanes * rows_a_thread;
    constexpr int per = Row<S, vectors>::per, width = vectors * row_lanes * per;
    NVFP4_DYNAMIC_SHARED(memory);
    float* const kept = reinterpret_cast<float*>(memory);  // [two tokens in turn][B, C][width]
    const int channels = static_cast<int>(blockIdx.x) % p.channel_blocks;
    const i64 unit = blockIdx.x / p.channel_blocks;
    const i64 row = unit / p.heads, head = unit % p.heads, group = head / (p.heads / p.groups);
    const i64 slot = p.indices ? p.indices[row] : row;
    const bool used = slot >= 0 && slot < p.slots;
    const int lane = lane_index() & (row_lanes - 1), size = static_cast<int>(p.state);

    int channel[rows_a_thread];  // of a warp's four rows at a time, neighbours
    Row<S, vectors> state[rows_a_thread];
    Raw* from = static_cast<Raw*>(p.states) + (used ? slot * p.slot_stride + head * p.head_stride : 0);
    NVFP4_UNROLL
    for (int r = 0; r < rows_a_thread; ++r) {
        channel[r] = channels * block_channels + (warp_index() * rows_a_thread + r) * 4 + lane_index() / row_lanes;
        const bool inside = used && channel[r] < p.head_dim;
        state[r].load(inside ? from + channel[r] * p.row_stride : from, inside ? size : 0, p.wide);
    }
    for (i64 t = 0; t < p.tokens; ++t) {
        float* const B = kept + (t & 1) * 2 * width;
        float* const C = B + width;
        for (int j = static_cast<int>(threadIdx.x); j < width; j += update_threads) {
            B[j] = j < size ? input(p.B, place(p.B, row, t, group) + j).v : 0.0f;
            C[j] = j < size ? input(p.C, place(p.C, row, t, group) + j).v : 0.0f;
        }
        __syncthreads();  // the token before last has been read by all, since they came here
        const F32x1 step(time_step(p, row, t, head));
        const F32x1 decay(expf((F32x1(p.A[head]) * step).v));
        NVFP4_UNROLL
        for (int r = 0; r < rows_a_thread; ++r) {
            const bool inside = channel[r] < p.head_dim;
            const F32x1 x = inside ? input(p.x, place(p.x, row, t, head) + channel[r]) : F32x1(0.0f);
            const F32x1 u = step * x;
            F32x1 sum(0.0f);
            NVFP4_UNROLL
            for (int n = 0; n < vectors; ++n) {
                NVFP4_UNROLL
                for (int i = 0; i < per; i += 4) {
                    const float4 b = *reinterpret_cast<const float4*>(B + (n * row_lanes + lane) * per + i);
                    const float4 c = *reinterpret_cast<const float4*>(C + (n * row_lanes + lane) * per + i);
                    const float bs[4] = {b.x, b.y, b.z, b.w}, cs[4] = {c.x, c.y, c.z, c.w};
                    NVFP4_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        F32x1& s = state[r].v[n][i + j];
                        s = decay * s + u * F32x1(bs[j]);
                        // outside the row an infinite u has made NaN of 0
                        if (Row<S, vectors>::element(n) + i + j < size) sum = sum + s * F32x1(cs[j]);
                    }
                }
            }
            NVFP4_UNROLL
            for (int d = 1; d < row_lanes; d *= 2) sum = sum + F32x1(__shfl_xor_sync(all_lanes, sum.v, d));
            if (inside && lane == 0) {
                if (p.D) sum = sum + x * F32x1(p.D[p.D_of_channels ? head * p.head_dim + channel[r] : head]);
                if (p.z.data) {
                    const F32x1 z = input(p.z, place(p.z, row, t, head) + channel[r]);
                    sum = sum * (z / (F32x1(1.0f) + F32x1(expf(-z.v))));
                }
                // no slot: 0; one that does not exist: NaN, since nobody can raise an error here
                const float none = slot < 0 ? 0.0f : real(U32x1(0x7FC00000u)).v;
                store_y(p, ((row * p.tokens + t) * p.heads + head) * p.head_dim + channel[r], used ? sum.v : none);
            }
            const u64 first = static_cast<u64>(((row * p.heads + head) * p.head_dim + channel[r]) * p.state);
            if constexpr (sizeof(Raw) == 2) state[r].template round<noisy>(p.noise, static_cast<u64>(t), first, size);
            if (p.made && used && inside) {
                Raw* to = static_cast<Raw*>(p.made) + row * p.made_row_stride + t * p.made_token_stride + head * p.made_head_stride;
                state[r].store(to + channel[r] * p.made_channel_stride, size, p.wide);
            }
        }
    }
    NVFP4_UNROLL
    for (int r = 0; r < rows_a_thread; ++r) {
        if (!p.made && used && channel[r] < p.head_dim) state[r].store(from + channel[r] * p.row_stride, size, p.wide);
    }
}

// By the state's dtype and the largest size they take; with noise or without.
#define NVFP4_STATE_UPDATE(name, S, noisy)                                                                                       \
    NVFP4_KERNEL(state_update_##name##_64, update_threads, 4, StateUpdateLaunch) { update<S, 2 / S::in_word, noisy>(p); }        \
    NVFP4_KERNEL(state_update_##name##_128, update_threads, 4, StateUpdateLaunch) { update<S, 4 / S::in_word, noisy>(p); }       \
    NVFP4_KERNEL(state_update_##name##_256, update_threads, 3, StateUpdateLaunch) { update<S, 8 / S::in_word, noisy>(p); }
NVFP4_STATE_UPDATE(fp32, Single, false)
NVFP4_STATE_UPDATE(fp16, Half, false)
NVFP4_STATE_UPDATE(bf16, Brain, false)
NVFP4_STATE_UPDATE(noisy_fp16, Half, true)
NVFP4_STATE_UPDATE(noisy_bf16, Brain, true)

}  // namespace nvfp4

// Values in memory, by dtype: how many a word holds, and what they are in fp32.
#pragma once
#include "arch/kernel.cuh"

namespace nvfp4 {

struct Single {
    using Raw = u32;
    static constexpr int in_word = 1;
    static __device__ __forceinline__ void widen(u32 word, F32x1* out) { out[0] = real(U32x1(word)); }
    static __device__ __forceinline__ u32 narrow(float x) { return bits(F32x1(x)).v; }
    // Largest magnitude of a word's values and of `most`, as bits of fp32: ordered as the magnitudes are, Inf and NaN last.
    static __device__ __forceinline__ u32 largest(u32 word, u32 most) {
        word &= 0x7FFFFFFFu;
        return word > most ? word : most;
    }
};

struct Brain {
    using Raw = u16;
    static constexpr int in_word = 2;
    static __device__ __forceinline__ void widen(u32 word, F32x1* out) {
        out[0] = real(U32x1(word << 16));
        out[1] = real(U32x1(word & 0xFFFF0000u));
    }
    static __device__ __forceinline__ u32 narrow(float x) {
        const u32 b = bits(F32x1(x)).v;
        return (b & 0x7FFFFFFFu) > 0x7F800000u ? b >> 16 | 0x40u : (b + 0x7FFFu + (b >> 16 & 1u)) >> 16;
    }
    static __device__ __forceinline__ u32 largest(u32 word, u32 most) {
        return Single::largest(word << 16, Single::largest(word & 0xFFFF0000u, most));
    }
};

struct Half {
    using Raw = u16;
    static constexpr int in_word = 2;
    static __device__ __forceinline__ void widen(u32 word, F32x1* out) {
        out[0] = F32x1(fp16_to_fp32(static_cast<u16>(word)));
        out[1] = F32x1(fp16_to_fp32(static_cast<u16>(word >> 16)));
    }
    static __device__ __forceinline__ u32 narrow(float x) { return fp32_to_fp16(x); }
    static __device__ __forceinline__ u32 largest(u32 word, u32 most) {
        F32x1 v[2];
        widen(word, v);
        return Single::largest(bits(v[0]).v, Single::largest(bits(v[1]).v, most));
    }
};

template <class T>
static __device__ __forceinline__ F32x1 widen_one(typename T::Raw raw) {
    F32x1 v[2];
    T::widen(raw, v);
    return v[0];
}

static __device__ __forceinline__ u32 warp_largest(u32 x) {
    NVFP4_UNROLL
    for (int d = 16; d > 0; d /= 2) {
        const u32 other = __shfl_xor_sync(all_lanes, x, d);
        x = other > x ? other : x;
    }
    return x;
}

// Of the whole block of `warps` warps, known to every thread; one barrier before and one after.
template <int warps>
static __device__ __forceinline__ u32 block_largest(u32 x) {
    using Found = u32[warps];
    NVFP4_SHARED(Found, found);
    x = warp_largest(x);
    __syncthreads();  // `found` may still be read from the last time
    if (lane_index() == 0) found[warp_index()] = x;
    __syncthreads();
    NVFP4_UNROLL
    for (int i = 0; i < warps; ++i) x = found[i] > x ? found[i] : x;
    return x;
}

}  // namespace nvfp4

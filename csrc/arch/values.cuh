// Values in memory, by dtype: how many a word holds, and what they are in fp32.
#pragma once
#include "arch/kernel.cuh"
#include "arch/ptx_pairs.cuh"

namespace nvfp4 {

struct Single {
    using Raw = u32;
    static constexpr int in_word = 1;
    static constexpr bool is_bf16 = false;
    static __device__ __forceinline__ void widen(u32 word, F32x1* out) { out[0] = real(U32x1(word)); }
    static __device__ __forceinline__ u32 narrow(float x) { return bits(F32x1(x)).v; }
    // The larger of magnitudes and of those in another word, value by value, NaN if there is one; and the largest of a word of
    // magnitudes, as bits of fp32: ordered as these are, Inf and NaN last.
    static __device__ __forceinline__ u32 larger(u32 a, u32 b) { return larger_fp32(a, b); }
    static __device__ __forceinline__ u32 largest(u32 word) { return word; }
};

struct Brain {
    using Raw = u16;
    static constexpr int in_word = 2;
    static constexpr bool is_bf16 = true;
    static __device__ __forceinline__ void widen(u32 word, F32x1* out) {
        out[0] = real(U32x1(word << 16));
        out[1] = real(U32x1(word & 0xFFFF0000u));
    }
    static __device__ __forceinline__ u32 narrow(float x) {
        const u32 b = bits(F32x1(x)).v;
        return (b & 0x7FFFFFFFu) > 0x7F800000u ? b >> 16 | 0x40u : (b + 0x7FFFu + (b >> 16 & 1u)) >> 16;
    }
    static __device__ __forceinline__ u32 larger(u32 a, u32 b) { return larger_bf16x2(a, b); }
    static __device__ __forceinline__ u32 largest(u32 word) { return Single::larger(word << 16, word & 0xFFFF0000u); }
};

struct Half {
    using Raw = u16;
    static constexpr int in_word = 2;
    static constexpr bool is_bf16 = false;
    static __device__ __forceinline__ void widen(u32 word, F32x1* out) {
        out[0] = F32x1(fp16_to_fp32(static_cast<u16>(word)));
        out[1] = F32x1(fp16_to_fp32(static_cast<u16>(word >> 16)));
    }
    static __device__ __forceinline__ u32 narrow(float x) { return fp32_to_fp16(x); }
    static __device__ __forceinline__ u32 larger(u32 a, u32 b) { return larger_f16x2(a, b); }
    static __device__ __forceinline__ u32 largest(u32 word) {
        F32x1 v[2];
        widen(word, v);
        return Single::larger(bits(v[0]).v, bits(v[1]).v);
    }
};

template <class T>
static __device__ __forceinline__ F32x1 widen_one(typename T::Raw raw) {
    F32x1 v[2];
    T::widen(raw, v);
    return v[0];
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

// What every cuda.cu begins with: CUDA's names, for nvcc and NVRTC, or their model on the CPU (host_model.h).
#pragma once
#if !defined(__CUDACC__)
#include "arch/host_model.h"
#else
#define NVFP4_SHARED(Type, name) __shared__ Type name
#define NVFP4_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// `blocks` of `threads` must fit a multiprocessor's registers at a time.
#define NVFP4_KERNEL(name, threads, blocks, Parameters) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Parameters p)
// `cluster` blocks that follow one another run at a time and reach each other's shared memory: sm_90 and newer.
#define NVFP4_CLUSTER_KERNEL(name, threads, blocks, cluster, Parameters) \
    extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads, blocks) \
        name(const __grid_constant__ Parameters p)
#endif
#include "arch/ptx.cuh"

namespace nvfp4 {

constexpr u32 all_lanes = 0xFFFFFFFFu;

static __device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x & 31); }
static __device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x >> 5); }

// Sixteen bytes, what one load or store of a lane moves at most.
struct alignas(16) Chunk {
    u32 x, y, z, w;
};

}  // namespace nvfp4

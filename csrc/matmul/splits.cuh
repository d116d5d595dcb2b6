// Blocks that have each a part of a sum: whichever comes last adds the parts up.
#pragma once
#include "arch/kernel.cuh"

#if defined(__CUDACC__)
// Counters at zero for launches that may run beside each other, which each takes a row: those of a stream, or of a stream in a
// graph, one row (ops/matmul/_cuda.py). Here and not in a tensor, which would have to be cleared in every graph.
extern "C" {
__device__ unsigned nvfp4_counters[2048][512];
}
#endif

namespace nvfp4 {

// To be called by whole blocks, `count` of them, when they have stored their parts (store_for_others16): true for the one that
// comes last, which may then read all parts (load_from_others16). `arrived`: zero before and after.
// Each thread fences between its stores and the barrier before the count, and between the barrier after it and its loads: of
// two such fences the one of the block that counted first comes first (PTX ISA, Memory Consistency Model, "Fence-SC Order").
static __device__ __forceinline__ bool comes_last(u32* arrived, i64 count) {
    NVFP4_SHARED(u32, before);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd(arrived, 1u);
    __syncthreads();
    if (before + 1 != static_cast<u32>(count)) return false;
    __threadfence();
    if (threadIdx.x == 0) *arrived = 0;
    return true;
}

}  // namespace nvfp4

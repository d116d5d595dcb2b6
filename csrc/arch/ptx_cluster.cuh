// What the blocks of a cluster (NVFP4_CLUSTER_KERNEL) have in common, on sm_90 and newer, each instruction with the section of
// the PTX ISA that defines it and, beside it, its model on the CPU (host_model.h).
#pragma once
#include "arch/kernel.cuh"

namespace nvfp4 {

#if defined(__CUDACC__)

// The address of block `rank` that is the address `mine` of this block's shared memory (PTX ISA, mapa).
static __device__ __forceinline__ u32 remote_address(u32 mine, u32 rank) {
    u32 a;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(mine), "r"(rank));
    return a;
}
// To another block's shared memory (PTX ISA, st, .shared::cluster).
static __device__ __forceinline__ void store_remote16(u32 to, Chunk v) {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
static __device__ __forceinline__ void store_remote4(u32 to, float v) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}
// Every thread of the cluster arrives, then waits for all: what they stored before, each then sees (PTX ISA, barrier.cluster).
static __device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
static __device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

#else  // the model

static inline u32 remote_address(u32 mine, u32 rank) { return host_model::remote_address(mine, rank); }
static inline void store_remote16(u32 to, Chunk v) { host_model::store_remote(to, &v, 16); }
static inline void store_remote4(u32 to, float v) { host_model::store_remote(to, &v, 4); }
static inline void cluster_arrive() { host_model::cluster_arrive(); }
static inline void cluster_wait() { host_model::cluster_wait(); }

#endif

}  // namespace nvfp4

// The asynchronous units of sm_100 and sm_103 - copy engine, tensor cores, tensor memory, the barriers in shared memory that
// say when they are done - each instruction with its section of the PTX ISA; their models on the CPU are in host_sm100.h.
// Shared memory goes by its 32-bit addresses here, tensor memory by lane << 16 | column.
#pragma once
#include "arch/kernel.cuh"
#include "arch/tensor_map.h"

// Targets of these two chips alone have the tensor cores' instructions (PTX ISA, tcgen05.mma, "Target ISA Notes"). A kernel must
// stand in nvcc's pass for the host too, and the model runs it anywhere.
#if !defined(__CUDA_ARCH__)
#define NVFP4_TCGEN05
#elif defined(NVFP4_OF_CHIP) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1100
#define NVFP4_TCGEN05
#endif

namespace nvfp4 {

// A matrix in shared memory, contiguous along k, as tcgen05.mma and tcgen05.cp take it (PTX ISA, tcgen05, "Shared memory
// descriptor"): address / 16 in bits 0..13, bytes from eight rows to the next eight / 16 in 32..45, the constant 1 in 46..48,
// the swizzle in 61..63. The leading-dimension offset has no meaning for one swizzle span (128 bytes) or core (16 bytes) of k.
static constexpr u32 no_swizzle = 0, swizzle_128 = 2;
NVFP4_HD constexpr u64 shared_matrix(u32 address, u32 eight_rows, u32 swizzle) {
    return u64((address & 0x3FFFFu) >> 4) | u64(eight_rows >> 4) << 32 | u64(1) << 46 | u64(swizzle) << 61;
}

// The kind of product, E2M1 x E2M1 under UE4M3 scales of 16, K = 64 (PTX ISA, tcgen05, "Instruction descriptor", table for
// kind::mxf4nvf4): E2M1 = 1 in bits 7..9 and 10..12, N / 8 in 17..22, scales UE4M3 = 0 in 23, M / 16 in 24..28. The
// scale ids stay 0: with four scales a row they fill the 32 bits of a column.
NVFP4_HD constexpr u32 block_scaled_kind(u32 m, u32 n) { return 1u << 7 | 1u << 10 | n / 8 << 17 | m / 16 << 24; }

}  // namespace nvfp4

#if !defined(__CUDACC__)
#include "arch/host_sm100.h"
#else

namespace nvfp4 {

// One lane of a warp whose lanes are all here, the same each time (PTX ISA, elect.sync).
static __device__ __forceinline__ bool elected() {
    u32 mine;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.b32 %0, 1, 0, p; }" : "=r"(mine));
    return mine != 0;
}

// A barrier of 8 bytes: its phase ends when `count` have arrived and as many bytes as were expected (PTX ISA, mbarrier.init).
static __device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes initialized barriers known to the asynchronous units (PTX ISA, membar / fence: fence.mbarrier_init, fence.proxy.async).
static __device__ __forceinline__ void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
// (PTX ISA, mbarrier.arrive)
static __device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and has the phase wait for so many bytes too (PTX ISA, mbarrier.arrive, .expect_tx).
static __device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns once a phase of this parity has ended: at once for parity 1 on a new barrier (PTX ISA, mbarrier.try_wait).
static __device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

// The box of a matrix that begins at (x, y), zeros outside, to shared memory; its bytes count at the barrier
// (PTX ISA, cp.async.bulk.tensor).
static __device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, i32 x, i32 y, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}
// Contiguous bytes, a multiple of 16 (PTX ISA, cp.async.bulk).
static __device__ __forceinline__ void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

// All 512 columns of tensor memory, to this warp; their address goes to shared memory (PTX ISA, tcgen05.alloc, .dealloc).
static __device__ __forceinline__ void tensor_allocate(u32 address_to) {
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 512;" ::"r"(address_to) : "memory");
    asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;");
}
static __device__ __forceinline__ void tensor_free(u32 tensor) {
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 512;" ::"r"(tensor));
}
// Orders tensor operations before, or after, what orders threads: a barrier on either side (PTX ISA, tcgen05.fence).
static __device__ __forceinline__ void tensor_fence_before() {
    asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
}
static __device__ __forceinline__ void tensor_fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// 32 rows of 16 bytes to four columns of lanes 0..31, and of the other three times 32 lanes (PTX ISA, tcgen05.cp).
static __device__ __forceinline__ void tensor_copy(u32 tensor, u64 matrix) {
    asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" ::"r"(tensor), "l"(matrix) : "memory");
}
// d (+)= a b^T under scales, d in fp32, one row a lane (PTX ISA, tcgen05.mma; "Block scaling").
static __device__ __forceinline__ void tensor_multiply(u32 d, u64 a, u64 b, u32 kind, u32 a_scales, u32 b_scales, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %6, 0;\n"
        "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X [%0], %1, %2, %3, [%4], [%5], p; }" ::"r"(d),
        "l"(a), "l"(b), "r"(kind), "r"(a_scales), "r"(b_scales), "r"(static_cast<u32>(add))
        : "memory");
}
// Arrives at the barrier once this thread's copies and products are done (PTX ISA, tcgen05.commit).
static __device__ __forceinline__ void tensor_commit(u32 barrier) {
    asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(barrier) : "memory");
}
// 32 columns of the lane that the thread is, of its warp's 32; valid from tensor_loaded on (PTX ISA, tcgen05.ld, .wait).
static __device__ __forceinline__ void tensor_load(u32 tensor, float (&v)[32]) {
    asm volatile(
        "tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,"
        "%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, [%32];"
        : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]), "=f"(v[4]), "=f"(v[5]), "=f"(v[6]), "=f"(v[7]), "=f"(v[8]),
          "=f"(v[9]), "=f"(v[10]), "=f"(v[11]), "=f"(v[12]), "=f"(v[13]), "=f"(v[14]), "=f"(v[15]), "=f"(v[16]),
          "=f"(v[17]), "=f"(v[18]), "=f"(v[19]), "=f"(v[20]), "=f"(v[21]), "=f"(v[22]), "=f"(v[23]), "=f"(v[24]),
          "=f"(v[25]), "=f"(v[26]), "=f"(v[27]), "=f"(v[28]), "=f"(v[29]), "=f"(v[30]), "=f"(v[31])
        : "r"(tensor));
}
static __device__ __forceinline__ void tensor_loaded(float (&v)[32]) {
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    NVFP4_UNROLL
    for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(v[i]));  // nothing reads them before
}

}  // namespace nvfp4

#endif

// Two blocks of a cluster on the host model that tell each other their ranks, done right or with one of the faults that the
// model must tell of.
#include "arch/ptx_cluster.cuh"

namespace nvfp4 {

enum Fault : i64 { none, too_early, read_early, unsent, twice, not_arrived, not_waited, ended, unaligned, elsewhere };

struct FaultLaunch {
    float* out;  // [blocks, 32]: what each thread was told
    i64 fault;
};

NVFP4_CLUSTER_KERNEL(neighbours, 32, 1, 2, FaultLaunch) {
    NVFP4_DYNAMIC_SHARED(memory);
    float* const told = reinterpret_cast<float*>(memory);
    const u32 rank = blockIdx.x % 2, other = p.fault == elsewhere ? 2 : 1 - rank;
    told[threadIdx.x] = -1.0f;
    if (p.fault != too_early) {
        cluster_arrive();
        cluster_wait();
    }
    if (p.fault == ended && rank == 0) return;
    if (p.fault == ended) {
        for (int i = 0; i < 9; ++i) __syncwarp();
    }
    const u32 to = remote_address(shared_address(told + threadIdx.x), other);
    store_remote4(to + (p.fault == unaligned ? 2 : 0), static_cast<float>(rank));
    if (p.fault != unsent && p.fault != not_arrived) cluster_arrive();
    if (p.fault == twice) cluster_arrive();
    if (p.fault == read_early) p.out[32 * blockIdx.x + threadIdx.x] = told[threadIdx.x];
    if (p.fault != unsent && p.fault != not_waited) cluster_wait();
    if (p.fault != read_early) p.out[32 * blockIdx.x + threadIdx.x] = told[threadIdx.x];
}

}  // namespace nvfp4

// Blocks that add up what each has left, whichever comes last, done right or with one of the faults that the model must tell of.
#include "arch/kernel.cuh"

namespace nvfp4 {

enum Fault : i64 { none, not_released, not_acquired, counted_early };

struct FaultLaunch {
    float* parts;  // [blocks, 64, 4]
    u32* arrived;
    float* out;  // [64]: the sum
    i64 fault;
};

NVFP4_KERNEL(parts_with_fault, 64, 1, FaultLaunch) {
    NVFP4_SHARED(u32, before);
    const auto place = [&](u32 block) { return p.parts + (block * 64 + threadIdx.x) * 4; };
    const auto count = [&] {
        if (threadIdx.x == 0) before = atomicAdd(p.arrived, 1u);
    };
    const float v[4] = {static_cast<float>(blockIdx.x + 1), 0, 0, 0};
    store_for_others16(place(blockIdx.x), v);
    if (p.fault == counted_early) count();
    if (p.fault != not_released) __threadfence();
    __syncthreads();
    if (p.fault != counted_early) count();
    __syncthreads();
    if (before + 1 != gridDim.x) return;
    if (p.fault != not_acquired) __threadfence();
    for (u32 block = 0; block < gridDim.x; ++block) {
        float part[4];
        load_from_others16(place(block), part);
        p.out[threadIdx.x] += part[0];
    }
}

}  // namespace nvfp4

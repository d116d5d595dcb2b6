// One product of a warpgroup on the host model, done right or with one of the faults that the model must tell of.
#include "arch/ptx_sm90.cuh"

namespace nvfp4 {

enum Fault : i64 { none, unshown, unfenced, a_changed, sums_changed, b_changed, unswizzled, not_waited, uneven };

struct FaultLaunch {
    const void* x;  // 16 KB
    float* out;     // [128]: the thread's first sum
    i64 fault;
};

NVFP4_KERNEL(product_with_fault, 128, 1, FaultLaunch) {
    NVFP4_DYNAMIC_SHARED(memory);
    unsigned char* const tokens = memory + (-shared_address(memory) & 1023u);
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < 1024; i += 128) copy_async16(tokens + 16 * i, static_cast<const unsigned char*>(p.x) + 16 * i, 16);
    commit_copies();
    wait_copies<0>();
    if (p.fault != unshown) show_to_tensor_cores();
    __syncthreads();

    u32 a[4] = {0x3F803F80u, 0, 0x3F803F80u, 0};
    float sums[64] = {};
    u64 b = swizzled_rows(shared_address(tokens));
    if (p.fault == unswizzled) b &= ~(u64(3) << 62);
    if (p.fault == uneven && thread == 5) b += 2;
    if (p.fault != unfenced) fence_registers();
    multiply_async(sums, a, b, false);
    multiply_async(sums, a, b + 2, true);
    commit_products();
    if (p.fault == a_changed) a[1] = 1;
    if (p.fault == sums_changed) sums[9] += 1;
    if (p.fault == b_changed && thread == 0) tokens[128] ^= 1;
    if (p.fault == not_waited) {
        wait_products<1>();
    } else {
        wait_products<0>();
    }
    settle(sums);
    p.out[thread] = sums[0];
}

extern "C" u64 nvfp4_swizzled_rows(u32 address) { return swizzled_rows(address); }

}  // namespace nvfp4

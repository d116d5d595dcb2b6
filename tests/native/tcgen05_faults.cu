// One product of 128 x 128 x 64 and a second on top of it, told as it should be, and with one fault at a time: the model of
// csrc/arch/host_sm100.h must not let it pass.
#include "arch/ptx_sm100.cuh"

namespace nvfp4 {

enum Fault : i64 {
    none, rows_apart, unswizzled, half_a_step, other_scales, scales_after, scales_too_soon, half_the_columns, other_scale_format,
    copies_not_awaited, products_not_awaited, sums_not_awaited, too_many_bytes, other_lanes, some_lanes, not_freed,
    barriers_unknown, no_fence_after
};

struct FaultLaunch {
    TensorMap a, b;
    const u8 *a_scales, *b_scales;  // two atoms each
    float* out;                     // [128, 128]
    i64 fault;
};

static constexpr u32 b_at = 128 * 128, scales_at = 2 * b_at, barriers_at = scales_at + 2048, address_at = barriers_at + 24;

NVFP4_KERNEL(faulty_products, 128, 1, FaultLaunch) {
    NVFP4_DYNAMIC_SHARED(memory);
    const u32 base = (shared_address(memory) + 1023) & ~1023u, full = base + barriers_at, done = full + 8, between = full + 16;
    const auto has = [&](Fault fault) { return p.fault == fault; };
    if (warp_index() == 0) {
        if (elected()) {
            for (u32 i = 0; i < 3; ++i) barrier_init(full + 8 * i, 1);
            if (!has(barriers_unknown)) barriers_made();
        }
        tensor_allocate(base + address_at);
    }
    tensor_fence_before();
    __syncthreads();
    tensor_fence_after();
    const u32 tensor = *reinterpret_cast<const u32*>(memory + (base - shared_address(memory)) + address_at), scales = tensor + 128;
    if (warp_index() == 0 && elected()) {
        barrier_expect(full, 2 * b_at + 2048 + (has(too_many_bytes) ? 16 : 0));
        copy_box(base, &p.a, 0, 0, full);
        copy_box(base + b_at, &p.b, 0, 0, full);
        copy_bytes(base + scales_at, p.a_scales, 1024, full);
        copy_bytes(base + scales_at + 1024, p.b_scales, 1024, full);
        if (!has(copies_not_awaited)) barrier_wait(full, 0);
        tensor_fence_after();
        u32 kind = block_scaled_kind(128, has(half_the_columns) ? 64 : 128);
        if (has(other_scale_format)) kind |= 1u << 23;
        const u32 apart = has(rows_apart) ? 512 : 1024, swizzle = has(unswizzled) ? no_swizzle : swizzle_128;
        for (u32 i = 0; i < 2; ++i) {
            const auto copy_scales = [&] {
                tensor_copy(scales, shared_matrix(base + scales_at + 512 * i, 128, no_swizzle));
                tensor_copy(scales + 4, shared_matrix(base + scales_at + 1024 + 512 * i, 128, no_swizzle));
            };
            if (!has(scales_after)) copy_scales();
            const u32 at = base + (has(half_a_step) ? 16 : 32) * i;
            tensor_multiply(tensor, shared_matrix(at, apart, swizzle), shared_matrix(at + b_at, apart, swizzle), kind, scales,
                            has(other_scales) ? scales : scales + 4, i > 0);
            if (has(scales_after)) copy_scales();
            if (i == 0) tensor_commit(between);
            if (i == 0 && !has(scales_too_soon)) barrier_wait(between, 0);  // before its scales give way to the next
            tensor_fence_after();
        }
        tensor_commit(done);
    }
    __syncwarp();
    if (!has(products_not_awaited)) barrier_wait(done, 0);
    if (!has(no_fence_after)) tensor_fence_after();
    const u32 lanes = 32 * static_cast<u32>(has(other_lanes) ? warp_index() ^ 1 : warp_index());
    for (u32 i = 0; i < 128; i += 32) {
        float sums[32];
        tensor_load((lanes << 16) + tensor + i, sums);
        if (!has(sums_not_awaited)) tensor_loaded(sums);
        if (has(some_lanes) && lane_index() == 0) tensor_loaded(sums);
        for (u32 j = 0; j < 32; ++j) p.out[threadIdx.x * 128 + i + j] = sums[j];
    }
    tensor_fence_before();
    __syncthreads();
    if (warp_index() == 0 && !has(not_freed)) tensor_free(tensor);
}

}  // namespace nvfp4

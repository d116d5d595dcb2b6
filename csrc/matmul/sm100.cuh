// NVFP4 times NVFP4 on the tensor cores of sm_100 and sm_103: tcgen05.mma under block scales, sums in tensor memory.
//
// A block takes tiles of 128 rows of a by 128 or 192 of b, one after the other. Its warps: 4 fetches 256 values of k at a time
// into a ring in shared memory, codes by boxes with 128-byte swizzle, zero beyond the operands; 5 copies scales to tensor
// memory and has the tensor cores multiply; 0 to 3 take finished sums out, 32 lanes each, while the next tile's come about in
// the other half. Barriers: `full` and `empty` for each stage of the ring, `done` and `taken` for each half.
//
// Scales come in the tensor cores' order (cuBLAS' 128x4 tiles): an atom is 512 bytes, byte 16 (m % 32) + 4 (m / 32) + kb of
// row m of 128 and block kb of the 4 in 64 values, so that tcgen05.cp lays down the four columns that one K = 64 product reads.
// swizzle_scales writes them: each operand's scales move once more (6% of its bytes), where reading them row-major in the GEMM
// would cost its producers a request a row and stage, 320 in the 384 cycles that a stage multiplies. Tiles of 192 have atoms
// of their own, the second half empty, and so never begin in the middle of one.
//
// 192 and not 256: twice 256 columns of sums leave no tensor memory for scales.
// Bytes: 0.5625 a value of a for each tile of columns, of b for each of rows; neighbours in time share them in L2 (place). At
// the tensor cores' full rate a tile of 192 asks for 40 KB in 384 cycles, more than L2 gives a processor, as any tile of one
// block does: others' kernels reach 53% of 9 PFLOP/s so, and 64% with pairs of blocks that share b (8192^3, B200).
#pragma once
#include "arch/ptx_sm100.cuh"
#include "epilogue.cuh"
#include "launch_sm100.h"

#if defined(NVFP4_TCGEN05)
namespace nvfp4::sm100 {

constexpr int scale_threads = 256, gemm_threads = 192;
constexpr u32 tile_rows = 128, row_bytes = 128, atom_bytes = 512, products = 4;  // of a stage

// Four neighbouring scales of a row, zero beyond its end.
static __device__ __forceinline__ u32 four_scales(const u8* row, i64 block, i64 blocks) {
    if (block + 4 <= blocks && (reinterpret_cast<u64>(row + block) & 3) == 0) {
        return *reinterpret_cast<const u32*>(row + block);
    }
    u32 word = 0;
    for (int i = 0; i < 4 && block + i < blocks; ++i) word |= u32(row[block + i]) << 8 * i;
    return word;
}

// A thread: 16 bytes, a lane's part of an atom. Neighbouring threads read along a row.
NVFP4_KERNEL(swizzle_scales, scale_threads, 1, SwizzleLaunch) {
    const int side = static_cast<int>(blockIdx.y);
    const i64 steps = (p.blocks + 3) / 4, atoms = (p.tile_rows[side] + 127) / 128;
    const i64 tiles = (p.rows[side] + p.tile_rows[side] - 1) / p.tile_rows[side], all = tiles * atoms * 32 * steps;
    for (i64 i = i64(blockIdx.x) * scale_threads + threadIdx.x; i < all; i += i64(gridDim.x) * scale_threads) {
        const i64 step = i % steps, lane = i / steps % 32, atom = i / steps / 32 % atoms, tile = i / steps / 32 / atoms;
        u32 word[4];
        NVFP4_UNROLL
        for (int q = 0; q < 4; ++q) {
            const i64 inside = atom * 128 + q * 32 + lane, row = tile * p.tile_rows[side] + inside;
            const bool there = inside < p.tile_rows[side] && row < p.rows[side];
            word[q] = there ? four_scales(p.from[side] + row * p.blocks, 4 * step, p.blocks) : 0;
        }
        u8* to = p.to[side] + ((tile * steps + step) * atoms + atom) * atom_bytes + lane * 16;
        *reinterpret_cast<Chunk*>(to) = {word[0], word[1], word[2], word[3]};
    }
}

// A tile of `width` columns of y, and where things lie: in a stage, after the ring, in tensor memory.
template <u32 width>
struct ScaledTile {
    static constexpr u32 stages = width == 128 ? 5 : 4, atoms = (width + 127) / 128;
    static constexpr u32 b = tile_rows * row_bytes, a_scales = b + width * row_bytes, b_scales = a_scales + products * atom_bytes;
    static constexpr u32 stage = b_scales + products * atoms * atom_bytes, codes = a_scales;
    static constexpr u32 leaving = stages * stage, full = leaving + 4 * 4096, empty = full + 8 * stages, done = empty + 8 * stages, taken = done + 16;
    static constexpr u32 address = taken + 16, bytes = address + 16;
    static constexpr u32 scale_columns = 4 * (1 + atoms), scales_at = 2 * width;  // of one product; of the first of two sets
    static_assert(scales_at + 2 * products * scale_columns <= 512, "tensor memory has 512 columns");
};

// Place in a ring, and the parity of the phases that its barriers are in.
template <u32 count>
struct Turn {
    u32 place = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++place == count) place = 0, parity ^= 1;
    }
};

// Tile `tile` of all. Eight tiles of rows share a column of tiles while it is in cache.
struct Place {
    i64 row, col;  // in tiles
    __device__ __forceinline__ Place(i64 tile, i64 down, i64 across) {
        const i64 first = tile / (8 * across) * 8, height = down - first < 8 ? down - first : 8;
        row = first + tile % (8 * across) % height;
        col = tile % (8 * across) / height;
    }
};

template <u32 width>
static __device__ __forceinline__ void fetch(const BlockScaledLaunch& p, u32 ring, i64 down, i64 across) {
    using T = ScaledTile<width>;
    const i64 atoms = (p.length + 63) / 64;  // along k
    Turn<T::stages> turn;
    for (i64 tile = blockIdx.x; tile < down * across; tile += gridDim.x) {
        const Place at(tile, down, across);
        for (i64 k = 0; k < atoms; k += products) {
            const u32 count = atoms - k < products ? static_cast<u32>(atoms - k) : products;
            const u32 stage = ring + turn.place * T::stage, full = ring + T::full + 8 * turn.place;
            barrier_wait(ring + T::empty + 8 * turn.place, turn.parity ^ 1);
            barrier_expect(full, T::codes + count * atom_bytes * (1 + T::atoms));
            copy_box(stage, &p.a, static_cast<i32>(k * 32), static_cast<i32>(at.row * tile_rows), full);
            copy_box(stage + T::b, &p.b, static_cast<i32>(k * 32), static_cast<i32>(at.col * width), full);
            copy_bytes(stage + T::a_scales, p.a_scales + (at.row * atoms + k) * atom_bytes, count * atom_bytes, full);
            copy_bytes(stage + T::b_scales, p.b_scales + (at.col * atoms + k) * T::atoms * atom_bytes,
                       count * T::atoms * atom_bytes, full);
            turn.next();
        }
    }
}

template <u32 width>
static __device__ __forceinline__ void multiply(const BlockScaledLaunch& p, u32 ring, u32 tensor, i64 tiles) {
    using T = ScaledTile<width>;
    constexpr u32 kind = block_scaled_kind(tile_rows, width);
    const i64 atoms = (p.length + 63) / 64;
    Turn<T::stages> turn, behind;  // behind: two uses ago
    Turn<2> half, set;
    u32 used = 0;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const u32 sums = tensor + half.place * width;
        barrier_wait(ring + T::taken + 8 * half.place, half.parity ^ 1);
        for (i64 k = 0; k < atoms; k += products) {
            const u32 count = atoms - k < products ? static_cast<u32>(atoms - k) : products;
            const u32 stage = ring + turn.place * T::stage;
            u32 scales = tensor + T::scales_at + set.place * products * T::scale_columns;
            barrier_wait(ring + T::full + 8 * turn.place, turn.parity);
            // The set of scales is free once the products two uses ago have read it: nothing orders a copy behind products
            // (PTX ISA, tcgen05, "Pipelined Instructions"). Those of the last use keep the tensor cores busy meanwhile.
            if (used < 2) {
                ++used;
            } else {
                barrier_wait(ring + T::empty + 8 * behind.place, behind.parity);
                behind.next();
            }
            tensor_fence_after();
            for (u32 i = 0; i < count; ++i) {
                const u32 to = scales + i * T::scale_columns;
                tensor_copy(to, shared_matrix(stage + T::a_scales + i * atom_bytes, 128, no_swizzle));
                NVFP4_UNROLL
                for (u32 j = 0; j < T::atoms; ++j) {
                    tensor_copy(to + 4 + 4 * j,
                                shared_matrix(stage + T::b_scales + (i * T::atoms + j) * atom_bytes, 128, no_swizzle));
                }
            }
            for (u32 i = 0; i < count; ++i) {
                const u32 to = scales + i * T::scale_columns;
                tensor_multiply(sums, shared_matrix(stage + 32 * i, 8 * row_bytes, swizzle_128),
                                shared_matrix(stage + T::b + 32 * i, 8 * row_bytes, swizzle_128), kind, to, to + 4,
                                k + i > 0);
            }
            tensor_commit(ring + T::empty + 8 * turn.place);
            turn.next();
            set.next();
        }
        tensor_commit(ring + T::done + 8 * half.place);
        half.next();
    }
}

// Four neighbours of a row of y, finished.
static __device__ __forceinline__ void put4(const BlockScaledLaunch& p, i64 row, i64 col, float (&y)[4]) {
    const i64 at = row * p.cols + col;
    const int size = p.out_dtype == 0 ? 4 : 2;
    u8* to = static_cast<u8*>(p.out) + at * size;
    const bool whole = col + 4 <= p.cols && (reinterpret_cast<u64>(to) & (4 * size - 1)) == 0;
    if (p.out_dtype == 0) {
        float* out = static_cast<float*>(p.out) + at;
        if (whole) {
            Chunk v = {0x80000000u, 0x80000000u, 0x80000000u, 0x80000000u};  // -0: adding it changes nothing
            if (p.accumulate) v = *reinterpret_cast<const Chunk*>(to);
            *reinterpret_cast<Chunk*>(to) = {bits(real(U32x1(v.x)) + F32x1(y[0])).v, bits(real(U32x1(v.y)) + F32x1(y[1])).v,
                                             bits(real(U32x1(v.z)) + F32x1(y[2])).v, bits(real(U32x1(v.w)) + F32x1(y[3])).v};
        } else {
            for (int i = 0; i < 4 && col + i < p.cols; ++i) out[i] = p.accumulate ? (F32x1(out[i]) + F32x1(y[i])).v : y[i];
        }
    } else {
        u32 half[4];
        NVFP4_UNROLL
        for (int i = 0; i < 4; ++i) half[i] = narrow_to(p.out_dtype, F32x1(y[i]));
        if (whole) {
            *reinterpret_cast<u64*>(to) = u64(half[2] | half[3] << 16) << 32 | (half[0] | half[1] << 16);
        } else {
            for (int i = 0; i < 4 && col + i < p.cols; ++i) reinterpret_cast<u16*>(to)[i] = static_cast<u16>(half[i]);
        }
    }
}

// Sums of 32 rows by 32 columns at a time go through `mine`, 4 KB of the warp's own: a lane comes with a row of tensor memory
// and leaves with four columns of every fourth row, so that eight lanes write a row's 64 or 128 bytes. Chunks of 16 bytes
// change places by their row, and no bank is met twice.
template <u32 width>
static __device__ __forceinline__ void take_out(const BlockScaledLaunch& p, u32 ring, u32 tensor, Chunk* mine, i64 down,
                                                i64 across) {
    using T = ScaledTile<width>;
    const u32 lanes = 32 * static_cast<u32>(warp_index());
    const int lane = lane_index(), chunk = lane & 7;
    float g = *p.a_global * *p.b_global;
    if ((bits(F32x1(g)).v & 0x7F800000u) == 0x7F800000u) g = real(U32x1(0x7FC00000u)).v;  // an infinite scale says NaN too
    Turn<2> half;
    for (i64 tile = blockIdx.x; tile < down * across; tile += gridDim.x) {
        const Place at(tile, down, across);
        barrier_wait(ring + T::done + 8 * half.place, half.parity);
        tensor_fence_after();
        for (u32 i = 0; i < width; i += 32) {
            float sums[32];
            tensor_load((lanes << 16) + tensor + half.place * width + i, sums);
            const i64 col = at.col * width + i + 4 * chunk;
            float bias[4];
            NVFP4_UNROLL
            for (int v = 0; v < 4; ++v) bias[v] = p.bias && col + v < p.cols ? load_as(p.bias, p.bias_dtype, col + v) : 0.0f;
            tensor_loaded(sums);
            if (i + 32 == width) {  // the half is free before the last sums are written
                tensor_fence_before();
                __syncwarp();
                if (lane == 0) barrier_arrive(ring + T::taken + 8 * half.place);
            }
            NVFP4_UNROLL
            for (int c = 0; c < 8; ++c) {
                const float* v = sums + 4 * c;
                mine[lane * 8 + (c ^ chunk)] = {bits(F32x1(v[0])).v, bits(F32x1(v[1])).v, bits(F32x1(v[2])).v, bits(F32x1(v[3])).v};
            }
            __syncwarp();
            for (int r = lane / 8; r < 32; r += 4) {
                const i64 row = at.row * tile_rows + lanes + r;
                if (row >= p.rows || col >= p.cols) break;
                const Chunk sum = mine[r * 8 + (chunk ^ (r & 7))];
                const u32 word[4] = {sum.x, sum.y, sum.z, sum.w};
                float y[4];
                NVFP4_UNROLL
                for (int v = 0; v < 4; ++v) {
                    const F32x1 scaled = real(U32x1(word[v])) * F32x1(g);
                    y[v] = (p.bias ? scaled + F32x1(bias[v]) : scaled).v;
                }
                put4(p, row, col, y);
            }
            __syncwarp();  // the next sums take the same place
        }
        half.next();
    }
}

template <u32 width>
static __device__ __forceinline__ void block_scaled(const BlockScaledLaunch& p) {
    NVFP4_DYNAMIC_SHARED(memory);
    using T = ScaledTile<width>;
    const u32 given = shared_address(memory), ring = (given + 1023) & ~1023u;  // the swizzle's pattern begins there
    const int warp = __shfl_sync(all_lanes, warp_index(), 0);                  // known to be one for the whole warp
    const i64 down = (p.rows + tile_rows - 1) / tile_rows, across = (p.cols + width - 1) / width;
    if (warp == 4 && elected()) {
        for (u32 i = 0; i < 2 * T::stages; ++i) barrier_init(ring + T::full + 8 * i, 1);
        for (u32 i = 0; i < 2; ++i) {
            barrier_init(ring + T::done + 8 * i, 1);
            barrier_init(ring + T::taken + 8 * i, 4);  // a lane of each warp
        }
        barriers_made();
    }
    if (warp == 5) tensor_allocate(ring + T::address);
    tensor_fence_before();
    __syncthreads();
    tensor_fence_after();
    const u32 tensor = *reinterpret_cast<const u32*>(memory + (ring - given) + T::address);
    if (warp < 4) {
        Chunk* mine = reinterpret_cast<Chunk*>(memory + (ring - given) + T::leaving) + warp * 256;
        take_out<width>(p, ring, tensor, mine, down, across);
    } else if (elected()) {
        if (warp == 4) fetch<width>(p, ring, down, across);
        else multiply<width>(p, ring, tensor, down * across);
    }
    tensor_fence_before();
    __syncthreads();
    tensor_fence_after();
    if (warp == 5) tensor_free(tensor);
}

NVFP4_KERNEL(tcgen05_128, gemm_threads, 1, BlockScaledLaunch) { block_scaled<128>(p); }
NVFP4_KERNEL(tcgen05_192, gemm_threads, 1, BlockScaledLaunch) { block_scaled<192>(p); }

}  // namespace nvfp4::sm100
#endif

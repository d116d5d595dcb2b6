// 65 to about 1,024 rows of bf16 times a packed NVFP4 weight on Hopper, where arithmetic takes as long as the weight's bytes.
//
// The weight is wgmma's operand A, decoded into registers: a packed slab's fragments are those of a warp's 16 rows. The tokens
// are operand B, in shared memory. Two warpgroups have `slabs` times 64 rows each, all of 128 tokens; k goes by in steps of
// 128, four stages in shared memory, loaded by cp.async two steps ahead. Products are issued for 32 k at a time; while they
// run, the next 32 k are decoded: two sets of A's registers.
// In a 64-wide tile of the packed layout a lane's four k-steps are 16 consecutive k, so what a k-step multiplies lies in eight
// groups of two values, in shared memory one run of 32 bytes: copies of four bytes put them there. Within a row that is
// the transposition of 8 by 4 words, and meets every bank once.
// Where tiles do not fill the device, the blocks share out the (tile, step) pairs evenly, each a run of them; sums of a tile's
// parts go to `partial`, and a second kernel adds them in the order of k: the same bits on every run.
// Of large groups each block has a tile of one, whole (parts.cuh), on a grid of slots and tiles of rows. Rows of x are read
// where they lie: a block notes in shared memory which row each of its tokens is, four of them to a load of the thread's.
// A step of 256 rows and 128 tokens takes the tensor cores 2,048 clocks; loads are 50 KB of L2 traffic in them. SASS
// instructions a weight in the loop: 4.6 with 256 rows, 6.0 with 128, where the tensor cores' time has room for 8.
#pragma once
#include "arch/ptx_sm90.cuh"
#include "epilogue.cuh"
#include "parts.cuh"

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace nvfp4 {
namespace hopper {

constexpr int block_threads = 256, warps = block_threads / 32, tokens = product_tokens, step = 128, stages = 4;
constexpr int slab_codes = 1024, slab_scales = 128, row_bytes = 128, half_bytes = tokens * row_bytes;  // half: 64 of a step's k

template <int slabs>  // a warp's, of 16 rows
struct Tile {
    static constexpr int slabs_of_all = 8 * slabs, rows = 16 * slabs_of_all, values = rows * tokens;
    static constexpr int codes = 2 * half_bytes, scales = codes + slabs_of_all * slab_codes;
    static constexpr int bytes = scales + slabs_of_all * slab_scales;  // of a stage: x, codes, scales
    static constexpr int row_stride = rows + 4;  // of results in shared memory: a warp's 32 meet every bank once
    static_assert(stages == 4 && bytes % 1024 == 0 && row_stride * tokens * 4 <= stages * bytes, "");
};

// How blocks share the work. Tiles of the same rows of the weight follow one another. Of groups: the blocks of a slot.
struct Work {
    i64 steps, token_tiles, units, blocks;

    __device__ __forceinline__ Work(const WeightOnlyLaunch& p, int rows)
        : steps(p.length / step), token_tiles(p.offsets ? 1 : (p.tokens + tokens - 1) / tokens),
          units(steps * token_tiles * ((p.rows + rows - 1) / rows)), blocks(p.splits) {}
    __device__ __forceinline__ i64 begin(i64 block) const { return units * block / blocks; }
    __device__ __forceinline__ i64 block_of(i64 unit) const { return ((unit + 1) * blocks - 1) / units; }
    // Where a block leaves its sums of a tile: a block has parts of two tiles at most, the first and the last.
    __device__ __forceinline__ i64 place(i64 block, i64 tile) const { return 2 * block + (begin(block) / steps != tile); }
};

// The row of x of each token of a tile: of those that a warp loads, which lie `warps` apart, side by side.
struct alignas(16) Rows {
    u32 of[warps][tokens / warps];
};

template <int slabs>
struct Source {
    using T = Tile<slabs>;
    static constexpr int slab_chunks = slab_codes / 16, scale_chunks = slab_scales / 16, slabs_apart = block_threads / slab_chunks;

    const unsigned char *codes, *scales, *x;  // of the step that is loaded next; of x in its first row
    const Chunk* rows;                        // of the warp's tokens, four for each quarter
    i64 slabs_stride;                         // bytes from one of the thread's slabs to its next
    int slabs_left, scale_slabs_left, tokens_left;
    int halves_left;  // of x, 64 columns each, that reach to the lane's word
    u32 x_stride, x_to;

    __device__ __forceinline__ Source(const WeightOnlyLaunch& p, const Part& part, const Rows& all_rows, i64 first_slab,
                                      i64 first_token, i64 k) {
        const int thread = static_cast<int>(threadIdx.x), word = lane_index(), warp = warp_index();
        const i64 all = (p.rows + 15) / 16, left = all - first_slab, slab_steps = p.length / step;
        first_slab += part.group * all;
        slabs_left = static_cast<int>(left < T::slabs_of_all ? left : T::slabs_of_all);
        scale_slabs_left = thread < T::slabs_of_all * scale_chunks ? slabs_left - thread / scale_chunks : 0;
        slabs_left -= thread / slab_chunks;
        codes = reinterpret_cast<const unsigned char*>(p.codes) +
                ((first_slab + thread / slab_chunks) * slab_steps + k) * slab_codes + thread % slab_chunks * 16;
        scales = reinterpret_cast<const unsigned char*>(p.scales) +
                 ((first_slab + thread / scale_chunks) * slab_steps + k) * slab_scales + thread % scale_chunks * 16;
        slabs_stride = slabs_apart * slab_steps * slab_codes;
        x = static_cast<const unsigned char*>(p.x) + k * (2 * row_bytes) + word * 4;
        x_stride = static_cast<u32>(p.x_stride * 2);
        rows = reinterpret_cast<const Chunk*>(all_rows.of[warp]);
        tokens_left = static_cast<int>(part.count - first_token < tokens ? part.count - first_token : tokens) - warp;
        halves_left = static_cast<int>((p.cols - 2 * word + 63) / 64 - 2 * k);
        // words 8 q + n of 64 k, the q-th of chunk n; chunks change places by the row's number
        x_to = static_cast<u32>(warp * row_bytes + (((word & 7) ^ warp) << 4) + word / 8 * 4);
    }

    // Starts a quarter of the step's loads, the first to the last in turn, so that other instructions can come between them.
    // What lies beyond the last row or token stays as it is: it meets nothing that is stored. Beyond the last column are zeros.
    template <int quarter>
    __device__ __forceinline__ void load(unsigned char* stage) {
        const int thread = static_cast<int>(threadIdx.x);
        u32 to = shared_address(stage) + x_to;
        keep_in_register(to);  // what follows are offsets of instructions
        const Chunk four = rows[quarter];
        const u32 row[4] = {four.x, four.y, four.z, four.w};
        NVFP4_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int token = (4 * quarter + i) * warps;
            const unsigned char* from = x + u64(row[i]) * x_stride;
            copy_async4(to + token * row_bytes, from, token < tokens_left, halves_left > 0);
            copy_async4(to + token * row_bytes + half_bytes, from + row_bytes, token < tokens_left, halves_left > 1);
        }
        if (quarter * slabs_apart < T::slabs_of_all && quarter * slabs_apart < slabs_left) {
            copy_async16(stage + T::codes + (thread + quarter * block_threads) * 16, codes + quarter * slabs_stride, 16);
        }
        if (quarter < 3) return;
        if (scale_slabs_left > 0) copy_async16(stage + T::scales + thread * 16, scales, 16);
        codes += slab_codes;
        scales += slab_scales;
        x += 2 * row_bytes;
        halves_left -= 2;
    }
};

// The thread's first slab of the block's; the others lie four further each.
template <int slabs>
static __device__ __forceinline__ int first_slab() {
    return warp_index() / 4 * 4 * slabs + warp_index() % 4;
}

// Issues the products of 32 k, a quarter of a stage, whose tokens `b` describes; what was issued before is over when this
// ends. `a` are registers that no product on its way reads. Sums begin anew unless `add`. Between the two, `load`.
template <int slabs, int quarter, class Load>
static __device__ __forceinline__ void multiply_quarter(const Chunk* q, const u32* s, u64 b, bool add, float (&sums)[slabs][64],
                                                        u32 (&a)[slabs][2][4], const Load& load) {
    constexpr bool later = quarter & 1;
    NVFP4_UNROLL
    for (int m = 0; m < slabs; ++m) {
        decode_weights(later ? q[m].z : q[m].x, s[m], a[m][0]);
        decode_weights(later ? q[m].w : q[m].y, s[m], a[m][1]);
    }
    fence_registers();
    NVFP4_UNROLL
    for (int i = 0; i < 2; ++i) {
        NVFP4_UNROLL
        for (int m = 0; m < slabs; ++m) {
            multiply_async(sums[m], a[m][i], b + (quarter / 2 * half_bytes + (2 * (quarter & 1) + i) * 32) / 16, add || quarter || i);
        }
    }
    commit_products();
    load();
    wait_products<1>();
}

// A run of steps of one tile, its sums to shared memory, [token][row].
template <int slabs>
static __device__ __forceinline__ void multiply_run(Source<slabs> source, i64 count, unsigned char* ring) {
    using T = Tile<slabs>;
    // The first product adds to nothing, but ptxas before 12.9 takes sums that nobody has set for sums that are set while products
    // are on their way, and has each product wait for the one before.
    float sums[slabs][64] = {};
    u32 a[2][slabs][2][4];  // of the products on their way, and of the next
    NVFP4_UNROLL
    for (int i = 0; i < stages - 2; ++i) {
        if (i < count) {
            source.template load<0>(ring + i * T::bytes);
            source.template load<1>(ring + i * T::bytes);
            source.template load<2>(ring + i * T::bytes);
            source.template load<3>(ring + i * T::bytes);
        }
        commit_copies();
    }
    const u64 b = swizzled_rows(shared_address(ring));
    int stage = 0;
    for (i64 k = 0; k < count; ++k) {
        wait_copies<stages - 3>();
        show_to_tensor_cores();
        __syncthreads();  // the step is here; everybody's products of the step before the last are over, whose stage is free
        const unsigned char* codes = ring + stage * T::bytes + T::codes + first_slab<slabs>() * slab_codes;
        const unsigned char* scales = ring + stage * T::bytes + T::scales + first_slab<slabs>() * slab_scales;
        unsigned char* const free = ring + (stage ^ 2) * T::bytes;
        const bool more = k + stages - 2 < count;
        const u64 x = b + stage * (T::bytes / 16);
        NVFP4_UNROLL
        for (int half = 0; half < 2; ++half) {
            Chunk q[slabs];
            u32 s[slabs];
            NVFP4_UNROLL
            for (int m = 0; m < slabs; ++m) {
                q[m] = reinterpret_cast<const Chunk*>(codes + 4 * m * slab_codes + half * 512)[lane_index()];
                const u32 both = reinterpret_cast<const u32*>(scales + 4 * m * slab_scales)[lane_index()];
                s[m] = half == 0 ? packed_scales<0>(both) : packed_scales<1>(both);
            }
            if (half == 0) {
                multiply_quarter<slabs, 0>(q, s, x, k > 0, sums, a[0], [&] { if (more) source.template load<0>(free); });
                multiply_quarter<slabs, 1>(q, s, x, true, sums, a[1], [&] { if (more) source.template load<1>(free); });
            } else {
                multiply_quarter<slabs, 2>(q, s, x, true, sums, a[0], [&] { if (more) source.template load<2>(free); });
                multiply_quarter<slabs, 3>(q, s, x, true, sums, a[1], [&] { if (more) source.template load<3>(free); });
            }
        }
        commit_copies();
        stage = (stage + 1) & (stages - 1);
    }
    wait_products<0>();
    wait_copies<0>();
    __syncthreads();  // nobody reads the ring any more
    float* results = reinterpret_cast<float*>(ring);
    NVFP4_UNROLL
    for (int m = 0; m < slabs; ++m) {
        settle(sums[m]);
        const int row = (first_slab<slabs>() + 4 * m) * 16 + lane_index() / 4;
        NVFP4_UNROLL
        for (int i = 0; i < 64; ++i) {
            const int token = i / 4 * 8 + 2 * (lane_index() & 3) + (i & 1);
            results[token * T::row_stride + row + 8 * (i >> 1 & 1)] = sums[m][i];
        }
    }
    __syncthreads();
}

// Four rows at a time of a tile, in whichever order: calls use(place in the tile, row, token).
template <int slabs, class Use>
static __device__ __forceinline__ void for_quads(int first, int apart, const Use& use) {
    constexpr int quads = Tile<slabs>::rows / 4;
    for (int i = first; i < quads * tokens; i += apart) use(i, i % quads * 4, i / quads);
}

template <int slabs>
static __device__ __forceinline__ void weight_only(const WeightOnlyLaunch& p) {
    using T = Tile<slabs>;
    NVFP4_DYNAMIC_SHARED(memory);
    unsigned char* const ring = memory + (-shared_address(memory) & 1023u);
    const u32 blocks = static_cast<u32>(p.splits);  // of a slot, one after the other: its tokens are read from memory once
    const Part part = find_part<tokens, block_threads>(p, blockIdx.x / blocks);
    if (part.count == 0) return;
    NVFP4_SHARED(Rows, rows);
    const Work work(p, T::rows);
    const i64 block = blockIdx.x % blocks;
    for (i64 unit = work.begin(block), end = work.begin(block + 1); unit < end;) {
        const i64 tile = unit / work.steps, from = unit % work.steps;
        const i64 to = from + end - unit < work.steps ? from + end - unit : work.steps;
        const i64 first_row = tile / work.token_tiles * T::rows, first_token = tile % work.token_tiles * tokens;
        if (threadIdx.x < tokens) {
            const i64 token = first_token + threadIdx.x;
            rows.of[threadIdx.x % warps][threadIdx.x / warps] =
                token < part.count ? static_cast<u32>(row_of_x(p, part.first + token)) : 0;
        }
        __syncthreads();  // the rows are known, and the ring is free
        multiply_run<slabs>(Source<slabs>(p, part, rows, first_row / 16, first_token, from), to - from, ring);
        const bool whole = to - from == work.steps;
        float* const partial = p.partial + work.place(block, tile) * T::values;
        const float g = scale_of(p, part.group);
        for_quads<slabs>(static_cast<int>(threadIdx.x), block_threads, [&](int i, int row, int token) {
            if (first_token + token >= part.count) return;
            const float4 v = *reinterpret_cast<const float4*>(ring + (token * T::row_stride + row) * 4);
            if (whole) {
                finish4(p, g, first_row + row, part.first + first_token + token, v);
            } else {
                reinterpret_cast<float4*>(partial)[i] = v;
            }
        });
        unit += to - from;
    }
}

// Adds up what blocks have left of each tile that several had a part of. Blocks of this kernel: tiles, parts of a tile.
template <int slabs>
static __device__ __forceinline__ void add_parts(const WeightOnlyLaunch& p) {
    using T = Tile<slabs>;
    const Work work(p, T::rows);
    const i64 tile = blockIdx.x, first = work.block_of(tile * work.steps), last = work.block_of((tile + 1) * work.steps - 1);
    if (first == last) return;
    const i64 first_row = tile / work.token_tiles * T::rows, first_token = tile % work.token_tiles * tokens;
    const float g = scale_of(p);
    const int thread = static_cast<int>(blockIdx.y * block_threads + threadIdx.x);
    for_quads<slabs>(thread, static_cast<int>(gridDim.y) * block_threads, [&](int i, int row, int token) {
        if (first_token + token >= p.tokens) return;
        float4 sum = {0, 0, 0, 0};
        for (i64 block = first; block <= last; ++block) {
            const float4 part = reinterpret_cast<const float4*>(p.partial + work.place(block, tile) * T::values)[i];
            sum = {(F32x1(sum.x) + F32x1(part.x)).v, (F32x1(sum.y) + F32x1(part.y)).v, (F32x1(sum.z) + F32x1(part.z)).v,
                   (F32x1(sum.w) + F32x1(part.w)).v};
        }
        finish4(p, g, first_row + row, first_token + token, sum);
    });
}

}  // namespace hopper

// By the rows of a tile. One block has a multiprocessor: 164 KB of shared memory, or 200.
NVFP4_KERNEL(weight_only_tiles_128, hopper::block_threads, 1, WeightOnlyLaunch) { hopper::weight_only<1>(p); }
NVFP4_KERNEL(weight_only_tiles_256, hopper::block_threads, 1, WeightOnlyLaunch) { hopper::weight_only<2>(p); }
NVFP4_KERNEL(weight_only_parts_128, hopper::block_threads, 4, WeightOnlyLaunch) { hopper::add_parts<1>(p); }
NVFP4_KERNEL(weight_only_parts_256, hopper::block_threads, 4, WeightOnlyLaunch) { hopper::add_parts<2>(p); }

}  // namespace nvfp4

#endif

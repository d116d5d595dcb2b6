// Few rows of bf16 activations times a packed NVFP4 weight, for decoding: the weight's bytes are all that takes time.
//
// The operands change places: the weight is the mma's 16-row operand, its values decoded in registers (decode.cuh), the
// tokens are the 8 columns. A block of four warps takes 128 rows of the weight and a part of k; it walks along k in steps of
// 128, with three steps (two for 64 tokens) on their way to shared memory by cp.async. A lane's four k-steps of a 64-wide
// tile are 16 consecutive k, so that one scale serves all 32 weights of a lane and 16 bytes of x all its columns.
// Splits of k leave fp32 sums in `partial`; whichever block of a tile ends last adds them up, always in the order of k: the
// same bits on every run.
// Of groups (experts), one launch serves all: a block finds its own tokens and their matrix (parts.cuh); matrices that nobody
// asks for are not read. The grid's axes: slots of tokens, splits of k, tiles of rows. So the slots of a large group, which
// read the same tile, are neighbours.
// Bytes: 0.5625 a weight; x comes from the L2 cache once for each 128 rows. SASS instructions a weight in the loop (sm_90):
// 2.7 for 8 tokens, 2.9 for 16; H200 issues 3.9 in the time that a weight takes to arrive.
#include "epilogue.cuh"
#include "parts.cuh"
#include "splits.cuh"
#include "sm120.cuh"
#include "sm90.cuh"

namespace nvfp4 {

constexpr int block_rows = 128, block_threads = 128, warp_slabs = 2;  // a slab: 16 rows
constexpr int step = 128;                                             // of k
constexpr int slab_bytes = 1024, slab_scale_bytes = 128;              // of a slab's codes and scales in a step
constexpr int slabs = block_rows / 16, token_bytes = step * 2;

// Eight tokens each: `groups` of them. What a stage of the ring holds: codes, scales, x.
template <int groups>
struct Stage {
    static constexpr int count = groups == 8 ? 3 : 4;
    static constexpr int scales = slabs * slab_bytes, x = scales + slabs * slab_scale_bytes, bytes = x + 8 * groups * token_bytes;
};

// Chunk `chunk` of a token's 256 bytes. Odd tokens change neighbours, so that the eight lanes that read 16 bytes at once, of
// two tokens, meet every bank once.
static __device__ __forceinline__ int x_place(int token, int chunk) { return token * token_bytes + ((chunk ^ (token & 1)) << 4); }

// What a thread loads of each step: places that a step moves on by a constant.
template <int groups>
struct Loader {
    static constexpr int slab_chunks = slab_bytes / 16, scale_chunks = slab_scale_bytes / 16, token_chunks = token_bytes / 16;
    static constexpr int slabs_apart = block_threads / slab_chunks, tokens_apart = block_threads / token_chunks;

    const unsigned char *codes, *scales, *x[groups];
    i64 slab_stride, x_left;  // bytes; x_left: of a row of x, from the thread's chunk on
    int slabs_left, scale_bytes, tokens_left, x_to;

    __device__ __forceinline__ Loader(const WeightOnlyLaunch& p, const Part& part, i64 tile) {
        const int thread = static_cast<int>(threadIdx.x), slab = thread / slab_chunks, token = thread / token_chunks;
        const i64 all = (p.rows + 15) / 16, steps = p.length / step, left = all - tile * slabs;
        const i64 first = part.group * all + tile * slabs;
        slabs_left = static_cast<int>(left < slabs ? left : slabs);
        slab_stride = steps * slab_bytes;
        codes = reinterpret_cast<const unsigned char*>(p.codes) + (first + slab) * slab_stride + thread % slab_chunks * 16;
        scales = reinterpret_cast<const unsigned char*>(p.scales) +
                 (first + thread / scale_chunks) * steps * slab_scale_bytes + thread % scale_chunks * 16;
        scale_bytes = thread / scale_chunks < slabs_left ? 16 : 0;
        slabs_left -= slab;
        tokens_left = part.count - token;
        NVFP4_UNROLL
        for (int i = 0; i < groups; ++i) {
            const i64 row = i * tokens_apart < tokens_left ? row_of_x(p, part.first + token + i * tokens_apart) : 0;
            x[i] = static_cast<const unsigned char*>(p.x) + row * p.x_stride * 2 + thread % token_chunks * 16;
        }
        x_left = p.cols * 2 - thread % token_chunks * 16;
        x_to = Stage<groups>::x + x_place(token, thread % token_chunks);
    }

    // Starts the loads of step k; zeros outside the weight and outside x.
    __device__ __forceinline__ void load(i64 k, unsigned char* stage) const {
        const int thread = static_cast<int>(threadIdx.x);
        const unsigned char* from = codes + k * slab_bytes;
        NVFP4_UNROLL
        for (int i = 0; i < slabs / slabs_apart; ++i) {
            copy_async16(stage + (thread + i * block_threads) * 16, from, i * slabs_apart < slabs_left ? 16 : 0);
            from += slabs_apart * slab_stride;
        }
        if (thread < slabs * scale_chunks) {
            copy_async16(stage + Stage<groups>::scales + thread * 16, scales + k * slab_scale_bytes, scale_bytes);
        }
        const i64 left = x_left - k * token_bytes;
        const int inside = left < 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
        NVFP4_UNROLL
        for (int i = 0; i < groups; ++i) {
            copy_async16(stage + x_to + i * tokens_apart * token_bytes, x[i] + k * token_bytes,
                         i * tokens_apart < tokens_left ? inside : 0);
        }
    }
};

template <int groups>
static __device__ __forceinline__ void multiply_stage(const unsigned char* stage, float (&sums)[warp_slabs][groups][4]) {
    const int lane = lane_index(), warp = warp_index();
    u32 scale[warp_slabs];
    NVFP4_UNROLL
    for (int m = 0; m < warp_slabs; ++m) {
        const unsigned char* from = stage + Stage<groups>::scales + (warp * warp_slabs + m) * slab_scale_bytes;
        scale[m] = reinterpret_cast<const u32*>(from)[lane];
    }
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) {
        u32 a[warp_slabs][4][4];
        NVFP4_UNROLL
        for (int m = 0; m < warp_slabs; ++m) {
            const unsigned char* from = stage + (warp * warp_slabs + m) * slab_bytes + half * 512;
            const Chunk q = reinterpret_cast<const Chunk*>(from)[lane];
            const u32 s = half == 0 ? packed_scales<0>(scale[m]) : packed_scales<1>(scale[m]);
            decode_weights(q.x, s, a[m][0]);
            decode_weights(q.y, s, a[m][1]);
            decode_weights(q.z, s, a[m][2]);
            decode_weights(q.w, s, a[m][3]);
        }
        NVFP4_UNROLL
        for (int n = 0; n < groups; ++n) {
            const int token = 8 * n + lane / 4, chunk = 8 * half + 2 * (lane & 3);
            const unsigned char* x = stage + Stage<groups>::x;
            const Chunk low = *reinterpret_cast<const Chunk*>(x + x_place(token, chunk));
            const Chunk high = *reinterpret_cast<const Chunk*>(x + x_place(token, chunk + 1));
            NVFP4_UNROLL
            for (int m = 0; m < warp_slabs; ++m) {
                multiply_bf16(sums[m][n], a[m][0], low.x, low.y);
                multiply_bf16(sums[m][n], a[m][1], low.z, low.w);
                multiply_bf16(sums[m][n], a[m][2], high.x, high.y);
                multiply_bf16(sums[m][n], a[m][3], high.z, high.w);
            }
        }
    }
}

// Adds up what the splits of a tile have left for `tokens` tokens, in their order, if this block is the last of them; else false.
template <int groups>
static __device__ __forceinline__ bool collect(const WeightOnlyLaunch& p, i64 tile, i64 split, int tokens,
                                               float (&sums)[warp_slabs][groups][4]) {
    constexpr int floats = warp_slabs * groups * block_threads * 4;
    const auto place = [&](i64 s, int m, int n) {
        return p.partial + (tile * p.splits + s) * floats + ((m * groups + n) * block_threads + static_cast<int>(threadIdx.x)) * 4;
    };
    const int column = 2 * (lane_index() & 3);  // the first of the thread's two tokens in each group
    NVFP4_UNROLL
    for (int m = 0; m < warp_slabs; ++m) {
        NVFP4_UNROLL
        for (int n = 0; n < groups; ++n) {
            if (8 * n + column < tokens) store_for_others16(place(split, m, n), sums[m][n]);
        }
    }
    if (!comes_last(p.arrived + tile, p.splits)) return false;
    NVFP4_UNROLL
    for (int m = 0; m < warp_slabs; ++m) {
        NVFP4_UNROLL
        for (int n = 0; n < groups; ++n) {
            float* v = sums[m][n];
            v[0] = v[1] = v[2] = v[3] = 0.0f;
            for (i64 s = 0; 8 * n + column < tokens && s < p.splits; ++s) {
                float part[4];
                load_from_others16(place(s, m, n), part);
                NVFP4_UNROLL
                for (int i = 0; i < 4; ++i) v[i] = (F32x1(v[i]) + F32x1(part[i])).v;
            }
        }
    }
    return true;
}

template <int groups>
static __device__ __forceinline__ void weight_only(const WeightOnlyLaunch& p) {
    NVFP4_DYNAMIC_SHARED(memory);
    constexpr int stages = Stage<groups>::count;
    const Part part = find_part<8 * groups, block_threads>(p, blockIdx.x);
    if (part.count == 0) return;
    const i64 split = blockIdx.y, tile = blockIdx.z, steps = p.length / step;
    const i64 begin = steps * split / p.splits, end = steps * (split + 1) / p.splits;
    const Loader<groups> loader(p, part, tile);
    float sums[warp_slabs][groups][4] = {};

    for (int i = 0; i < stages - 1; ++i) {
        if (begin + i < end) loader.load(begin + i, memory + i * Stage<groups>::bytes);
        commit_copies();
    }
    int stage = 0;
    for (i64 k = begin; k < end; ++k) {
        wait_copies<stages - 2>();
        __syncthreads();  // the step is here, and everybody is done with the stage loaded next
        const i64 next = k + stages - 1;
        if (next < end) loader.load(next, memory + (stage == 0 ? stages - 1 : stage - 1) * Stage<groups>::bytes);
        commit_copies();
        multiply_stage<groups>(memory + stage * Stage<groups>::bytes, sums);
        stage = stage == stages - 1 ? 0 : stage + 1;
    }
    wait_copies<0>();

    if (p.splits > 1 && !collect<groups>(p, i64(blockIdx.x) * gridDim.z + tile, split, part.count, sums)) return;
    const float g = scale_of(p, part.group);
    const i64 row = tile * block_rows + warp_index() * (16 * warp_slabs) + lane_index() / 4;
    NVFP4_UNROLL
    for (int m = 0; m < warp_slabs; ++m) {
        NVFP4_UNROLL
        for (int n = 0; n < groups; ++n) {
            NVFP4_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int token = 8 * n + 2 * (lane_index() & 3) + (i & 1);
                if (token < part.count) finish(p, g, row + 16 * m + 8 * (i >> 1), part.first + token, sums[m][n][i]);
            }
        }
    }
}

// By the tokens they serve. Shared memory has room for four blocks on H200's multiprocessors (three of 32 tokens, two of 64):
// 36 to 108 KB of weight on their way, where latency times bandwidth is 26.
NVFP4_KERNEL(weight_only_8, block_threads, 4, WeightOnlyLaunch) { weight_only<1>(p); }
NVFP4_KERNEL(weight_only_16, block_threads, 4, WeightOnlyLaunch) { weight_only<2>(p); }
NVFP4_KERNEL(weight_only_32, block_threads, 3, WeightOnlyLaunch) { weight_only<4>(p); }
NVFP4_KERNEL(weight_only_64, block_threads, 2, WeightOnlyLaunch) { weight_only<8>(p); }

// A packed weight to bf16 [rows, length] under its block scales, for products in memory: a warp has a slab's 64 columns, four
// lanes the 128 bytes of each row in them.
NVFP4_KERNEL(decode_packed, 256, 4, DecodeLaunch) {
    const i64 tiles = p.length / 64, warp = i64(blockIdx.x) * 8 + warp_index(), slab = warp / tiles, tile = warp % tiles;
    if (slab >= p.slabs) return;
    const int lane = lane_index();
    const Chunk q = reinterpret_cast<const Chunk*>(p.codes)[warp * 32 + lane];
    const u32 both = p.scales[warp / 2 * 32 + lane], s = tile % 2 == 0 ? packed_scales<0>(both) : packed_scales<1>(both);
    u32 a[4][4];
    decode_weights(q.x, s, a[0]);
    decode_weights(q.y, s, a[1]);
    decode_weights(q.z, s, a[2]);
    decode_weights(q.w, s, a[3]);
    NVFP4_UNROLL
    for (int h = 0; h < 2; ++h) {
        Chunk* out = reinterpret_cast<Chunk*>(static_cast<u16*>(p.out) + (16 * slab + 8 * h + lane / 4) * p.length + 64 * tile) +
                     2 * (lane & 3);
        NVFP4_UNROLL
        for (int i = 0; i < 2; ++i) {
            const auto value = [&](int j, int pair) { return scaled_bf16x2<false>(a[2 * i + j][h + 2 * pair], 0x4900u); };  // 2^19
            out[i] = {value(0, 0), value(0, 1), value(1, 0), value(1, 1)};
        }
    }
}

}  // namespace nvfp4

#include "sm100.cuh"

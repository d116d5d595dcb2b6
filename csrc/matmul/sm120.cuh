// NVFP4 times NVFP4 on sm_120 and sm_121: both operands row-major, codes and scales as NVFP4Tensor holds them.
//
// A block of four warps makes 128 x 128 of y, a warp 64 x 64 of it: 32 mmas of 16x8x64 for each 64 k, two such steps of k in a
// stage. Two stages of codes (16 KB each) and two of scales (4 KB, 256 k of each row, so that a copy takes 16 bytes of a row)
// make 40 KB; with at most 255 registers, two blocks share a processor. Why that should do, in clocks of an RTX 5090, where an
// mma keeps a quarter of a processor busy for 16 (1.68 PFLOP/s, 170 processors, 2.4 GHz); derived, not measured:
//   A stage is 256 mmas, 1,024 clocks. The next one's 18.4 KB are on their way meanwhile, 600 to 1,000 clocks, and the other
//   block of the processor works on. That one's main loop also covers this block's beginning and end, which is what a
//   persistent grid or warps of their own for loads would be for.
//   Shared memory, 128 bytes a clock: a stage takes 256 clocks of ldmatrix, 96 of scales, 144 to fill, 496 of the 1,024. Eight
//   warps of 64 x 32 would take 656.
//   L2: 18.4 KB a stage are 18 bytes a clock and processor, of 64. Blocks run in groups of sixteen rows of tiles, so that those
//   that run together, about 16 x 21 tiles, read each of their rows and columns from memory once.
//   Instructions: 4.0 for each mma in the loop, 0.8 of them the NOPs that ptxas puts between mmas; 16 could issue.
//   Few tiles: k is split so that all processors work; whichever block of a tile ends last adds the sums up in the order of k.
//
// Bank conflicts: none. 64 bytes of a row of codes are four chunks, chunk c of row r in place c ^ (r / 2 mod 4): the eight rows
// that ldmatrix reads at once meet each bank once, and so do the eight copies that fill two rows. Scales of a row are 16 bytes;
// rows 8 to 15 of each 16 change halves with 4 to 7, because lanes read those of rows g and g + 8 at once.
// Columns of y: rows of b change places within 16 (column_place), so that a lane's two mmas bring four columns side by side:
// it stores 16 bytes of fp32, or 8 of a narrower type, and four lanes fill whole sectors.
//
// Rows whose length is no multiple of 64 values the caller has padded (zeros under zero scales). A scale of NaN makes NaN of
// what it touches; a negative one, which quantize never writes and ue4m3 cannot say, makes NaN of the warp's 64 x 64.
#pragma once
#include "arch/ptx_sm120.cuh"
#include "epilogue.cuh"
#include "splits.cuh"

#if defined(NVFP4_MULTIPLIES_E2M1)
namespace nvfp4 {

// y [rows, cols] = g_a g_b sum_k a[row, k] b[col, k] (+ bias).
struct BlockScaledLaunch {
    const unsigned char *a, *a_scales;  // [rows, length / 2], [rows, length / 16], at multiples of 16 bytes
    const float* a_global;
    const unsigned char *b, *b_scales;
    const float* b_global;
    const void* bias;  // [cols] or null
    void* out;         // [rows, cols]
    float* partial;    // of each tile and split, in the order of its threads' sums; null for one split
    u32* arrived;      // [tiles], zero before and after: splits that have left their sums
    i64 rows, cols;
    i64 length;  // a multiple of 64
    i64 splits;
    i32 bias_dtype, out_dtype;  // 0 fp32, 1 fp16, 2 bf16
    i32 accumulate;             // add to out, which is fp32
    i32 aligned;                // cols is a multiple of 4 and out begins at a multiple of 16 bytes
};

namespace sm120 {

constexpr int side = 128, threads = 128, step = 128, piece = 256;  // of y; of a block; of k in a stage and in one of scales
constexpr int row_bytes = step / 2, operand_bytes = side * row_bytes, stage_bytes = 2 * operand_bytes;
constexpr int scale_bytes = piece / 16, piece_bytes = 2 * side * scale_bytes;
constexpr int scales_from = 2 * stage_bytes;
constexpr u32 group_rows = 16;  // of tiles

struct alignas(8) Pair {
    u32 x, y;
};

static __device__ __forceinline__ int code_place(int row, int chunk) { return row * row_bytes + ((chunk ^ (row >> 1 & 3)) << 4); }
static constexpr __device__ __forceinline__ int scale_place(int row) { return (row ^ (row >> 1 & 4)) * scale_bytes; }
// Sixteen lanes load 8 bytes at once, of rows g and g + 8, in 32 banks of 4.
static constexpr __device__ bool meet_each_bank_once(int first_lane) {
    unsigned banks = 0;
    for (int lane = first_lane; lane < first_lane + 16; ++lane) banks |= 3u << scale_place(lane / 4 + 8 * (lane & 1)) / 4 % 32;
    return banks == 0x33333333u;
}
static_assert(meet_each_bank_once(0) && meet_each_bank_once(16), "");
// Where column 8 x + 4 y + 2 z + w of each 16 lies: two columns from each four in either half.
static __device__ __forceinline__ int column_place(int col) {
    return (col & ~15) | (col & 2) << 2 | (col & 12) >> 1 | (col & 1);
}

// What a thread copies of one operand.
struct Loader {
    static constexpr int rows_apart = threads / 4;
    const unsigned char *codes, *scales;
    u32 stride, scale_stride;  // bytes
    int rows, to, scales_to;   // of the operand in this tile; where the thread's go

    __device__ __forceinline__ Loader(const unsigned char* all_codes, const unsigned char* all_scales, i64 length, i64 first,
                                      i64 all_rows, bool permuted, int operand) {
        const int thread = static_cast<int>(threadIdx.x), row = thread / 4, chunk = thread & 3;
        const i64 left = all_rows - first;
        stride = static_cast<u32>(length / 2);
        scale_stride = static_cast<u32>(length / 16);
        codes = all_codes + first * stride + static_cast<u64>(static_cast<u32>(row)) * stride + chunk * 16;
        scales = all_scales + first * scale_stride + static_cast<u64>(threadIdx.x) * scale_stride;
        rows = static_cast<int>(left < side ? left : side);
        to = operand * operand_bytes + code_place(permuted ? column_place(row) : row, chunk);
        scales_to = operand * side * scale_bytes + scale_place(permuted ? column_place(thread) : thread);
    }

    // Step k's codes; zeros beyond the last row.
    __device__ __forceinline__ void load(unsigned char* stage, int k, int inside) const {
        const unsigned char* from = codes + static_cast<i64>(k) * row_bytes;
        const int row = static_cast<int>(threadIdx.x) / 4;
        NVFP4_UNROLL
        for (int i = 0; i < side / rows_apart; ++i) {
            copy_async16(stage + to + i * rows_apart * row_bytes, from, row < rows - i * rows_apart ? inside : 0);
            from += static_cast<u64>(rows_apart) * stride;
        }
    }

    // The scales of 256 k, in one copy where rows allow that.
    __device__ __forceinline__ void load_scales(unsigned char* stage, int k) const {
        const unsigned char* from = scales + static_cast<i64>(k) * scale_bytes;
        const bool row_inside = static_cast<int>(threadIdx.x) < rows;
        if (scale_stride % scale_bytes == 0) {
            copy_async16(stage + scales_to, from, row_inside ? scale_bytes : 0);
        } else {
            const int left = static_cast<int>(scale_stride) - k * scale_bytes;
            NVFP4_UNROLL
            for (int i = 0; i < scale_bytes; i += 4) copy_async4(stage + scales_to + i, from + i, row_inside && i < left ? 4 : 0);
        }
    }
};

using Sums = float[4][8][4];

// Adds a stage's products; gathers in `signs` what bits the scales had.
static __device__ __forceinline__ void multiply(const unsigned char* stage, const unsigned char* scales, Sums& sums, u32& signs) {
    const int lane = lane_index(), warp = warp_index(), g = lane / 4;
    const int m = (warp >> 1) * 64, n = (warp & 1) * 64;
    Pair a_scales[4], b_scales[8];
    NVFP4_UNROLL
    for (int i = 0; i < 4; ++i) {
        a_scales[i] = *reinterpret_cast<const Pair*>(scales + scale_place(m + 16 * i + g + 8 * (lane & 1)));
        signs |= a_scales[i].x | a_scales[i].y;
    }
    NVFP4_UNROLL
    for (int j = 0; j < 8; ++j) {
        b_scales[j] = *reinterpret_cast<const Pair*>(scales + side * scale_bytes + scale_place(n + 8 * j + g));
        signs |= b_scales[j].x | b_scales[j].y;
    }
    // the matrices in the order of the mma's registers: rows of 16 first for a, chunks first for b
    const int a_row = lane & 15, a_chunk = lane >> 4, b_row = (lane & 7) | (lane >> 1 & 8), b_chunk = lane >> 3 & 1;
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) {
        u32 a[4][4];
        NVFP4_UNROLL
        for (int i = 0; i < 4; ++i) load_matrices(a[i], stage + code_place(m + 16 * i + a_row, 2 * half + a_chunk));
        NVFP4_UNROLL
        for (int j = 0; j < 8; j += 2) {
            u32 b[4];
            load_matrices(b, stage + operand_bytes + code_place(n + 8 * j + b_row, 2 * half + b_chunk));
            NVFP4_UNROLL
            for (int i = 0; i < 4; ++i) {
                const u32 of_a = half == 0 ? a_scales[i].x : a_scales[i].y;
                multiply_e2m1(sums[i][j], a[i], b[0], b[1], of_a, half == 0 ? b_scales[j].x : b_scales[j].y);
                multiply_e2m1(sums[i][j + 1], a[i], b[2], b[3], of_a, half == 0 ? b_scales[j + 1].x : b_scales[j + 1].y);
            }
        }
    }
}

// Leaves the sums of a split; true for the block that comes last, which then has the sums of all, added in the order of k.
static __device__ __forceinline__ bool collect(const BlockScaledLaunch& p, i64 tile, Sums& sums) {
    const auto place = [&](i64 split, int i) {
        return p.partial + (((tile * p.splits + split) * 32 + i) * threads + static_cast<int>(threadIdx.x)) * 4;
    };
    NVFP4_UNROLL
    for (int i = 0; i < 32; ++i) store_for_others16(place(blockIdx.y, i), sums[i / 8][i % 8]);
    if (!comes_last(p.arrived + tile, p.splits)) return false;
    NVFP4_UNROLL
    for (int half = 0; half < 32; half += 16) {  // sixteen loads at a time: all would want more registers than there are
        NVFP4_UNROLL
        for (int i = half; i < half + 16; ++i) {
            NVFP4_UNROLL
            for (int j = 0; j < 4; ++j) sums[i / 8][i % 8][j] = 0.0f;
        }
        for (i64 split = 0; split < p.splits; ++split) {
            NVFP4_UNROLL
            for (int i = half; i < half + 16; ++i) {
                float part[4];
                load_from_others16(place(split, i), part);
                NVFP4_UNROLL
                for (int j = 0; j < 4; ++j) sums[i / 8][i % 8][j] = (F32x1(sums[i / 8][i % 8][j]) + F32x1(part[j])).v;
            }
        }
    }
    return true;
}

// Four columns of a row of y.
static __device__ __forceinline__ void write(const BlockScaledLaunch& p, i64 at, int count, const float (&y)[4]) {
    if (p.out_dtype == 0) {
        float* out = static_cast<float*>(p.out) + at;
        if (p.aligned) {
            float4 v = {y[0], y[1], y[2], y[3]};
            if (p.accumulate) {
                const float4 old = *reinterpret_cast<const float4*>(out);
                v = {(F32x1(old.x) + F32x1(v.x)).v, (F32x1(old.y) + F32x1(v.y)).v, (F32x1(old.z) + F32x1(v.z)).v,
                     (F32x1(old.w) + F32x1(v.w)).v};
            }
            *reinterpret_cast<float4*>(out) = v;
        } else {
            NVFP4_UNROLL
            for (int i = 0; i < 4; ++i) {
                if (i < count) out[i] = p.accumulate ? (F32x1(out[i]) + F32x1(y[i])).v : y[i];
            }
        }
        return;
    }
    u16* out = static_cast<u16*>(p.out) + at;
    u32 v[4];
    NVFP4_UNROLL
    for (int i = 0; i < 4; ++i) v[i] = narrow_to(p.out_dtype, F32x1(y[i]));
    if (p.aligned) {
        *reinterpret_cast<Pair*>(out) = {v[0] | v[1] << 16, v[2] | v[3] << 16};
    } else {
        NVFP4_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i < count) out[i] = static_cast<u16>(v[i]);
        }
    }
}

static __device__ __forceinline__ void finish(const BlockScaledLaunch& p, i64 first_row, i64 first_col, const Sums& sums) {
    F32x1 g = F32x1(*p.a_global) * F32x1(*p.b_global);
    if ((bits(g).v & 0x7F800000u) == 0x7F800000u) g = real(U32x1(0x7FC00000u));  // an infinite scale says NaN too
    const int lane = lane_index();
    const i64 rows_left = p.rows - first_row - (lane >> 2);
    NVFP4_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
        const i64 col = first_col + 16 * pair + 4 * (lane & 3), left = p.cols - col;
        if (left <= 0) continue;
        const int count = left < 4 ? static_cast<int>(left) : 4;
        float bias[4] = {};
        NVFP4_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (p.bias && i < count) bias[i] = load_as(p.bias, p.bias_dtype, col + i);
        }
        i64 at = (first_row + (lane >> 2)) * p.cols + col;
        NVFP4_UNROLL
        for (int i = 0; i < 8; ++i) {
            float y[4];
            NVFP4_UNROLL
            for (int c = 0; c < 4; ++c) {
                y[c] = (F32x1(sums[i / 2][2 * pair + c / 2][2 * (i & 1) + (c & 1)]) * g + F32x1(bias[c])).v;
            }
            if (8 * i < rows_left) write(p, at, count, y);
            at += 8 * p.cols;
        }
    }
}

static __device__ __forceinline__ void run(const BlockScaledLaunch& p) {
    NVFP4_DYNAMIC_SHARED(memory);
    const u32 down = static_cast<u32>((p.rows + side - 1) / side), across = static_cast<u32>((p.cols + side - 1) / side);
    const u32 group = blockIdx.x / (group_rows * across), within = blockIdx.x % (group_rows * across);
    const u32 height = down - group * group_rows < group_rows ? down - group * group_rows : group_rows;
    const i64 first_row = static_cast<i64>(group * group_rows + within % height) * side;
    const i64 first_col = static_cast<i64>(within / height) * side;
    const u32 pieces = static_cast<u32>((p.length + piece - 1) / piece), splits = static_cast<u32>(p.splits);
    const int steps = static_cast<int>((p.length + step - 1) / step);
    const int begin = static_cast<int>(pieces * blockIdx.y / splits * 2);
    const int piece_end = static_cast<int>(pieces * (blockIdx.y + 1) / splits * 2), end = piece_end < steps ? piece_end : steps;

    const Loader a(p.a, p.a_scales, p.length, first_row, p.rows, false, 0);
    const Loader b(p.b, p.b_scales, p.length, first_col, p.cols, true, 1);
    const int chunks = static_cast<int>(p.length / 32) - static_cast<int>(threadIdx.x & 3);  // of a row, from the thread's own on
    const auto load = [&](int k) {
        unsigned char* codes = memory + (k & 1) * stage_bytes;
        const int inside = 4 * k < chunks ? 16 : 0;
        a.load(codes, k, inside);
        b.load(codes, k, inside);
        if ((k & 1) == 0) {
            unsigned char* scales = memory + scales_from + (k >> 1 & 1) * piece_bytes;
            a.load_scales(scales, k / 2);
            b.load_scales(scales, k / 2);
        }
    };

    Sums sums = {};
    u32 signs = 0;
    load(begin);
    commit_copies();
    for (int k = begin; k < end; ++k) {
        wait_copies<0>();
        __syncthreads();  // the step is here, and everybody is done with the stage loaded next
        if (k + 1 < end) load(k + 1);
        commit_copies();
        const unsigned char* scales = memory + scales_from + (k >> 1 & 1) * piece_bytes + (k & 1) * 8;
        multiply(memory + (k & 1) * stage_bytes, scales, sums, signs);
    }
    wait_copies<0>();

    if (__ballot_sync(all_lanes, signs & 0x80808080u)) {
        NVFP4_UNROLL
        for (int i = 0; i < 128; ++i) sums[i / 32][i / 4 % 8][i % 4] = real(U32x1(0x7FC00000u)).v;
    }
    if (p.splits > 1 && !collect(p, blockIdx.x, sums)) return;
    finish(p, first_row + (warp_index() >> 1) * 64, first_col + (warp_index() & 1) * 64, sums);
}

}  // namespace sm120

NVFP4_KERNEL(block_scaled, sm120::threads, 2, BlockScaledLaunch) { sm120::run(p); }

}  // namespace nvfp4
#endif

// quantize on GPUs: one read of x for the amax (of the values and of their transform), one for the codes of both forms.
//
//   g = 448 * 6 / amax,  scale = e4m3(amax_block * g / 6),  code = e2m1(x / (scale / g))        (numerics/block_scale.h)
//
// Bytes a value, bf16 in: 2 + 2 read, 0.5625 written a form. Nothing is read by the host: the amax kernels leave what each
// block found, and every block of the quantizing kernel takes the largest of it.
#include "encode.cuh"

namespace nvfp4 {

struct Target {
    const FormLaunch& f;
    const i64 &lines, &runs, &first;  // of what is wanted; blocks that the form has before it

    // The number of a block in the form.
    __device__ __forceinline__ i64 at(i64 line, i64 run) const { return first + line * f.runs + run; }
    // Whether `count` blocks from `run`, a multiple of it, exist and lie at a multiple of it.
    __device__ __forceinline__ bool whole(i64 run, int count) const {
        return ((first | f.runs) & (count - 1)) == 0 && run + count <= runs;
    }
    // Eight bytes of codes; nothing outside the matrix.
    __device__ __forceinline__ void store_codes(i64 line, i64 run, const u32* word) const {
        if (line >= lines || run >= runs) return;
        *reinterpret_cast<u64*>(f.codes + at(line, run) * 8) = word[0] | static_cast<u64>(word[1]) << 32;
    }
    // Four scales, those of the runs that exist.
    __device__ __forceinline__ void store_scales(i64 line, i64 run, u32 four) const {
        if (line >= lines || run >= runs) return;
        u8* to = f.scales + at(line, run);
        if (whole(run, 4)) {
            *reinterpret_cast<u32*>(to) = four;
            return;
        }
        for (int i = 0; i < 4 && run + i < runs; ++i) to[i] = static_cast<u8>(four >> (8 * i));
    }
    // MXFP8: half a block's codes, and from its first half the scale.
    __device__ __forceinline__ void store_bytes(i64 line, i64 run, const u32* word, u32 scale) const {
        if (line >= lines || run >= runs) return;
        *reinterpret_cast<Chunk*>(f.codes + at(line, run) * 16) = {word[0], word[1], word[2], word[3]};
        if (run % 2 == 0) f.scales[at(line, run) / 2] = static_cast<u8>(scale);
    }
};

// What the columns of a tile became, until whole memory sectors of it can be written. The 4 words of padding send the two
// halves of a column's 32 bytes to different banks.
struct Staged {
    u64 codes[4][tile_side + 4];
    u8 scales[tile_side][4];
};

template <int known>
static __device__ __forceinline__ void write_rows(const Target& to, const Encoded& made, i64 row, i64 block) {
    const int lane = lane_index();
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) {
        const i64 line = row + 16 * warp_index() + (lane & 7) + 8 * half;
        to.store_codes(line, block + (lane >> 3), made.word[half]);
        u32 four = made.scale[half] << (lane & 24);  // of the row's four blocks, in four lanes
        four |= __shfl_xor_sync(all_lanes, four, 8);
        four |= __shfl_xor_sync(all_lanes, four, 16);
        if (lane < 8) to.store_scales(line, block, four);
    }
}

static __device__ __forceinline__ void write_cols(const Target& to, const Encoded& made, Staged& staged, i64 col, i64 block) {
    const int lane = lane_index(), warp = warp_index(), thread = static_cast<int>(threadIdx.x);
    *reinterpret_cast<Chunk*>(&staged.codes[warp][2 * lane]) = {made.word[0][0], made.word[0][1], made.word[1][0], made.word[1][1]};
    staged.scales[2 * lane][warp] = static_cast<u8>(made.scale[0]);
    staged.scales[2 * lane + 1][warp] = static_cast<u8>(made.scale[1]);
    __syncthreads();
    const int c = thread >> 1, half = thread & 1;
    const u64 codes[2] = {staged.codes[2 * half][c], staged.codes[2 * half + 1][c]};
    const u32 words[4] = {static_cast<u32>(codes[0]), static_cast<u32>(codes[0] >> 32), static_cast<u32>(codes[1]),
                          static_cast<u32>(codes[1] >> 32)};
    const i64 run = block + 2 * half;
    if (col + c < to.lines && to.whole(run, 2)) {
        *reinterpret_cast<Chunk*>(to.f.codes + to.at(col + c, run) * 8) = {words[0], words[1], words[2], words[3]};
    } else {
        to.store_codes(col + c, run, words);
        to.store_codes(col + c, run + 1, words + 2);
    }
    if (thread < tile_side) to.store_scales(col + thread, block, *reinterpret_cast<const u32*>(staged.scales[thread]));
}

// Of all that the pass before found.
static __device__ __forceinline__ u32 largest(const u32* found, i64 count) {
    u32 most = 0;
    for (i64 i = threadIdx.x; i < count; i += tile_threads) most = found[i] > most ? found[i] : most;
    return block_largest<tile_threads / 32>(most);
}

// What follows from the amax of the values and of their transform; with a NaN or an infinity among the values every code and
// scale is 0 and the global scale NaN. The scale is written by whoever is given a place for it.
template <int known>
static __device__ __forceinline__ TensorScale form_scale(Options<known> o, u32 values, u32 turned, float* out) {
    const bool bad = values >= 0x7F800000u;
    const u32 most = o.is_rotated() ? turned : values;
    const TensorScale s = tensor_scale(bad ? 0.0f : real(U32x1(most)).v, o.chooses() ? 256.0f : 448.0f);
    if (out != nullptr) *out = bad ? real(U32x1(0x7FC00000u)).v : s.g_dec;
    return s;
}

// Zeros for the blocks of each line beyond the last group's, of which there is less than one for each block of the grid.
static __device__ __forceinline__ void clear_rest(const QuantizeLaunch& p, i64 left) {
    const i64 last = p.starts[p.groups] / 16, line = left + threadIdx.x;
    const i64 first = 0;
    const Target to{p.col, p.cols, p.col.runs, first};
    const u32 nothing[4] = {0, 0, 0, 0};
    if (threadIdx.x >= tile_side || line >= p.cols) return;
    for (i64 run = (last < 0 ? 0 : last) + blockIdx.y; run < p.col.runs; run += gridDim.y) {
        if (p.col.block == static_cast<i32>(Block::b1x32)) {
            to.store_bytes(line, run, nothing, 0);
        } else {
            to.store_codes(line, run, nothing);
            p.col.scales[to.at(line, run)] = 0;
        }
    }
}

template <class T, int row_known, int col_known>
static __device__ __forceinline__ void quantize(const QuantizeLaunch& p) {
    NVFP4_DYNAMIC_SHARED(memory);
    NVFP4_SHARED(Staged, staged);
    const Options<row_known> row{p.row};
    const Options<col_known> col{p.col};
    NVFP4_SHARED(Part, part);
    find_part(p, sizeof(typename T::Raw), part);
    const Target rows{p.row, part.rows, p.row.runs, part.row_first}, cols{p.col, p.cols, part.col_runs, part.col_first};
    const i64 left = static_cast<i64>(blockIdx.x) * tile_side;

    const u32* const amax = p.amax + part.matrix * 3 * p.programs;
    const bool first = blockIdx.x + threadIdx.x == 0;
    u32 values = largest(amax, p.programs), col_values = values;
    TensorScale row_scale = {}, col_scale = {};
    if (row.is_present()) {
        const u32 turned = row.is_rotated() ? largest(amax + p.programs, p.programs) : 0;
        row_scale = form_scale(row, values, turned, first && blockIdx.y == 0 ? p.row.global_scale + part.matrix : nullptr);
    }
    if (col.is_present() && p.offsets == nullptr) {
        const u32 turned = col.is_rotated() ? largest(amax + 2 * p.programs, p.programs) : 0;
        col_scale = form_scale(col, values, turned, first && blockIdx.y == 0 ? p.col.global_scale + part.matrix : nullptr);
    } else if (col.is_present()) {
        clear_rest(p, left);
        if (part.group < 0) return;
        col_values = amax[part.group];
        float* const out = first && part.tile == 0 ? p.col.global_scale + part.group : nullptr;
        col_scale = form_scale(col, col_values, amax[2 * p.groups + part.group], out);
    }
    const bool bad = values >= 0x7F800000u, col_bad = col_values >= 0x7F800000u;
    u64 seed = 0, offset = 0;
    if (row.is_stochastic() || col.is_stochastic()) {
        seed = p.noise[0];
        offset = p.noise[1];
    }

    constexpr bool gathers = row_known == absent || row_known == anything;  // beside a row form nobody does
    const TileRing<T, gathers> ring{p, memory, left, part};
    ring.walk([&](const unsigned char* tile, i64 top) {
        const int lane = lane_index(), warp = warp_index();
        F32x1 v[2][16];
        if (row.is_present()) {
            row_blocks<T>(tile, v);
            const i64 line = top + 16 * warp + (lane & 7), block = left / 16 + (lane >> 3);
            const i64 index[2] = {rows.at(line, block), rows.at(line + 8, block)};
            Encoded made = encode<row_known, false>(row, row_scale, v, index, seed, offset + static_cast<u64>(p.row.advance));
            if (bad) made = Encoded{};
            write_rows<row_known>(rows, made, top, left / 16);
        }
        if (col.is_present()) {
            col_blocks<T>(tile, v);
            const i64 line = left + 2 * lane, block = top / 16 + warp;
            const i64 index[2] = {cols.at(line, block), cols.at(line + 1, block)};
            Encoded made = encode<col_known, true>(col, col_scale, v, index, seed, offset + static_cast<u64>(p.col.advance));
            if (col_bad) made = Encoded{};
            write_cols(cols, made, staged, left, top / 16);
        }
    });
}

// Either form or both in MXFP8, whose scales are the blocks' own: x is read once.
template <class T>
static __device__ __forceinline__ void quantize_mxfp8(const QuantizeLaunch& p) {
    using Magnitudes = u32[4][tile_side];
    NVFP4_DYNAMIC_SHARED(memory);
    NVFP4_SHARED(Magnitudes, halves);
    NVFP4_SHARED(Part, part);
    find_part(p, sizeof(typename T::Raw), part);
    const Target rows{p.row, part.rows, p.row.runs, part.row_first}, cols{p.col, p.cols, part.col_runs, part.col_first};
    const i64 left = static_cast<i64>(blockIdx.x) * tile_side;
    if (p.offsets != nullptr) {
        clear_rest(p, left);
        if (part.group < 0) return;
    }
    const TileRing<T> ring{p, memory, left, part};
    ring.walk([&](const unsigned char* tile, i64 top) {
        const int lane = lane_index(), warp = warp_index();
        F32x1 v[2][16];
        u32 most[2];
        const auto largest_of_mine = [&] {
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) {
                most[half] = 0;
                NVFP4_UNROLL
                for (int j = 0; j < 16; ++j) most[half] = Single::largest(bits(v[half][j]).v, most[half]);
            }
        };
        const auto with = [&](int half, u32 other) { most[half] = other > most[half] ? other : most[half]; };
        if (p.row.codes != nullptr) {
            row_blocks<T>(tile, v);
            largest_of_mine();
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) with(half, __shfl_xor_sync(all_lanes, most[half], 8));
            const EncodedBytes made = encode_mxfp8(v, most);
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) {
                rows.store_bytes(top + 16 * warp + (lane & 7) + 8 * half, left / 16 + (lane >> 3), made.word[half], made.scale[half]);
            }
        }
        if (p.col.codes != nullptr) {
            col_blocks<T>(tile, v);
            largest_of_mine();
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) halves[warp][2 * lane + half] = most[half];
            __syncthreads();
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) with(half, halves[warp ^ 1][2 * lane + half]);
            const EncodedBytes made = encode_mxfp8(v, most);
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) {
                cols.store_bytes(left + 2 * lane + half, top / 16 + warp, made.word[half], made.scale[half]);
            }
        }
    });
}

// The largest magnitudes that the scales want, each block's to its place in p.amax. Of the values alone: 16 bytes a load,
// four of them on their way at once; p.rows lines of p.cols values.
constexpr int amax_threads = 256, amax_loads = 4;

template <class T>
static __device__ __forceinline__ void amax_of_values(const QuantizeLaunch& p) {
    using Raw = typename T::Raw;
    constexpr int values = 16 / sizeof(Raw);
    constexpr i64 piece = static_cast<i64>(amax_threads) * amax_loads * values;
    const auto* x = static_cast<const Raw*>(p.x) + blockIdx.z * p.matrix_stride;
    const i64 pieces = (p.cols + piece - 1) / piece;
    u32 most = 0;
    for (i64 at = blockIdx.x; at < p.rows * pieces; at += gridDim.x) {
        const Raw* line = x + at / pieces * p.row_stride;
        const i64 begin = at % pieces * piece;
        if (p.wide && begin + piece <= p.cols) {
            u32 v[amax_loads][4];
            NVFP4_UNROLL
            for (int i = 0; i < amax_loads; ++i) load_once16(line + begin + (threadIdx.x + i * amax_threads) * values, v[i]);
            NVFP4_UNROLL
            for (int i = 0; i < amax_loads; ++i) {
                NVFP4_UNROLL
                for (int w = 0; w < 4; ++w) most = T::largest(v[i][w], most);
            }
            continue;
        }
        const i64 end = begin + piece < p.cols ? begin + piece : p.cols;
        for (i64 j = begin + threadIdx.x; j < end; j += amax_threads) most = T::largest(line[j], most);
    }
    most = block_largest<amax_threads / 32>(most);
    if (threadIdx.x == 0) p.amax[blockIdx.z * 3 * p.programs + blockIdx.x] = most;
}

// Of the values and of the transforms of those forms that have one; of each group by itself, in whatever order its blocks come:
// the largest of them is the same.
template <class T>
static __device__ __forceinline__ void amax_of_transforms(const QuantizeLaunch& p) {
    NVFP4_DYNAMIC_SHARED(memory);
    NVFP4_SHARED(Part, part);
    find_part(p, sizeof(typename T::Raw), part);
    u32 values = 0, turned[2] = {0, 0};
    const auto turn = [&](const F32x1* given, i32 signs, u32& most) {
        F32x1 v[16];
        NVFP4_UNROLL
        for (int j = 0; j < 16; ++j) {
            v[j] = given[j];
            values = Single::largest(bits(v[j]).v, values);
        }
        if (signs < 0) return;
        hadamard16(v, static_cast<u32>(signs));
        NVFP4_UNROLL
        for (int j = 0; j < 16; ++j) most = Single::largest(bits(v[j]).v, most);
    };
    const TileRing<T> ring{p, memory, static_cast<i64>(blockIdx.x) * tile_side, part};
    ring.walk([&](const unsigned char* tile, i64) {
        F32x1 v[2][16];
        if (p.row.hadamard >= 0 || p.col.hadamard < 0) {
            row_blocks<T>(tile, v);
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) turn(v[half], p.row.hadamard, turned[0]);
        }
        if (p.col.hadamard >= 0) {
            col_blocks<T>(tile, v);
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) turn(v[half], p.col.hadamard, turned[1]);
        }
    });
    values = block_largest<tile_threads / 32>(values);
    NVFP4_UNROLL
    for (int form = 0; form < 2; ++form) turned[form] = block_largest<tile_threads / 32>(turned[form]);
    if (threadIdx.x != 0) return;
    const u32 found[3] = {values, turned[0], turned[1]};
    const i64 at = part.matrix * 3 * p.programs + static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x;
    NVFP4_UNROLL
    for (int kind = 0; kind < 3; ++kind) {
        if (p.offsets == nullptr) {
            p.amax[at + kind * p.programs] = found[kind];
        } else if (part.group >= 0) {
            atomicMax(p.amax + kind * p.groups + part.group, found[kind]);
        }
    }
}

// For each dtype: the amax kernels, a kernel that reads all options from its parameters, and that for MXFP8.
#define NVFP4_QUANTIZE(name, T)                                                                    \
    NVFP4_KERNEL(amax_values_##name, amax_threads, 4, QuantizeLaunch) { amax_of_values<T>(p); }       \
    NVFP4_KERNEL(amax_transforms_##name, tile_threads, 5, QuantizeLaunch) { amax_of_transforms<T>(p); } \
    NVFP4_KERNEL(quantize_any_##name, tile_threads, 3, QuantizeLaunch) { quantize<T, anything, anything>(p); } \
    NVFP4_KERNEL(quantize_mxfp8_##name, tile_threads, 5, QuantizeLaunch) { quantize_mxfp8<T>(p); }
NVFP4_QUANTIZE(fp32, Single)
NVFP4_QUANTIZE(fp16, Half)
NVFP4_QUANTIZE(bf16, Brain)

// The recipe's forms, known to the compiler: an activation for inference, for training, tokens that experts gather, a gradient,
// a weight.
NVFP4_KERNEL(quantize_row_bf16, tile_threads, 5, QuantizeLaunch) { quantize<Brain, present, absent>(p); }
NVFP4_KERNEL(quantize_activation_bf16, tile_threads, 5, QuantizeLaunch) { quantize<Brain, present, present | rotated>(p); }
NVFP4_KERNEL(quantize_gathered_bf16, tile_threads, 5, QuantizeLaunch) { quantize<Brain, absent, present | rotated>(p); }
NVFP4_KERNEL(quantize_gradient_bf16, tile_threads, 5, QuantizeLaunch) {
    quantize<Brain, present | stochastic, present | stochastic | rotated>(p);
}
NVFP4_KERNEL(quantize_weight_bf16, tile_threads, 5, QuantizeLaunch) { quantize<Brain, present | tiles16, present | tiles16>(p); }
NVFP4_KERNEL(quantize_weight_fp32, tile_threads, 5, QuantizeLaunch) { quantize<Single, present | tiles16, present | tiles16>(p); }

}  // namespace nvfp4

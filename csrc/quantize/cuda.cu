// quantize on GPUs: one read of x for the amax (of the values and of their transform), one for the codes of both forms.
//
//   g = 448 * 6 / amax,  scale = e4m3(amax_block * g / 6),  code = e2m1(x / (scale / g))        (numerics/block_scale.h)
//
// Bytes a value, bf16 in: 2 + 2 read, 0.5625 written a form. Nothing is read by the host: the amax kernels leave what each
// block found, and every block of the quantizing kernel takes the largest of it. What follows from a block's scale is worked out
// for all scales once a block of threads. Both forms of a weight have the same codes: they are transposed, and not made twice.
#include "outputs.cuh"

namespace nvfp4 {

// Of all that the pass before found.
static __device__ __forceinline__ u32 largest(const u32* found, i64 count) {
    u32 most = 0;
    for (u32 i = threadIdx.x; i < static_cast<u32>(count); i += tile_threads) most = found[i] > most ? found[i] : most;
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
    if (threadIdx.x >= tile_side || line >= p.cols) return;
    for (i64 run = (last < 0 ? 0 : last) + blockIdx.y; run < p.col.runs; run += gridDim.y) {
        const i64 at = line * p.col.runs + run;
        if (p.col.block == static_cast<i32>(Block::b1x32)) {
            *reinterpret_cast<Chunk*>(p.col.codes + at * 16) = {0, 0, 0, 0};
            p.col.scales[at / 2] = 0;
        } else {
            *reinterpret_cast<u64*>(p.col.codes + at * 8) = 0;
            p.col.scales[at] = 0;
        }
    }
}

// A thread's two blocks as the form takes them: as they are, rotated, or, where only the launch knows, in fp32. `load` gets them,
// again if their sums were too large. All lanes come here together.
template <int known, class T>
struct Taken {
    static constexpr bool any = (known & anything) != 0, turns = (known & rotated) != 0;
    template <bool condition, class A, class B> struct Choice { using Type = B; };
    template <class A, class B> struct Choice<true, A, B> { using Type = A; };
    using Type = typename Choice<any, Single, typename Choice<turns, Brain, T>::Type>::Type;

    template <class Load>
    static __device__ __forceinline__ void take(Options<known> o, Load load, Run<Type> (&x)[2]) {
        if constexpr (any) {
            if (o.is_rotated()) {
                Run<Brain> y[2];
                rotate<T>(load, o.f, y);
                widen(y, x);
            } else {
                Run<T> y[2];
                load(y);
                widen(y, x);
            }
        } else if constexpr (turns) {
            rotate<T>(load, o.f, x);
        } else {
            load(x);
        }
    }
    template <class Y>
    static __device__ __forceinline__ void widen(const Run<Y> (&y)[2], Run<Single> (&x)[2]) {
        NVFP4_UNROLL
        for (int half = 0; half < 2; ++half) {
            NVFP4_UNROLL
            for (int k = 0; k < 8; ++k) {
                const Pair v = pair_of(y[half], k);
                x[half].word[2 * k] = bits(F32x1(v.x)).v;
                x[half].word[2 * k + 1] = bits(F32x1(v.y)).v;
            }
        }
    }
};

template <class T, int row_known, int col_known>
static __device__ __forceinline__ void quantize(const QuantizeLaunch& p) {
    constexpr bool crosses = row_known == col_known && row_known == (present | tiles16);  // both forms have the same codes
    NVFP4_DYNAMIC_SHARED(memory);  // a tile
    NVFP4_SHARED(Staged, staged);
    using Crossings = Crossing[2];
    NVFP4_SHARED(Crossings, crossings);
    NVFP4_SHARED(Factors, row_factors);
    NVFP4_SHARED(Factors, col_factors);
    NVFP4_SHARED(Part, part);
    const Options<row_known> row{p.row};
    const Options<col_known> col{p.col};
    find_part(p, sizeof(typename T::Raw), part);
    const i64 left = static_cast<i64>(blockIdx.x) * tile_side;

    constexpr bool gathers = row_known == absent || row_known == anything;  // beside a row form nobody does
    Reader<T, gathers> reader(p, part, left);
    Run<T> x[2];
    const auto load = [&](int half) { reader.load(half, x[half]); };
    load(0);
    load(1);
    reader.to_next_tile();

    const u32* const amax = p.amax + part.matrix * 3 * p.programs;
    const bool first = blockIdx.x + threadIdx.x == 0;
    const u32 values = largest(amax, p.programs);
    u32 col_values = values;
    TensorScale row_scale = {}, col_scale = {};
    if (row.is_present()) {
        const u32 turned = row.is_rotated() ? largest(amax + p.programs, p.programs) : 0;
        row_scale = form_scale(row, values, turned, first && blockIdx.y == 0 ? p.row.global_scale + part.matrix : nullptr);
        put_factors(row_scale, row_factors);
    }
    if (col.is_present() && p.offsets == nullptr) {
        const u32 turned = col.is_rotated() ? largest(amax + 2 * p.programs, p.programs) : 0;
        float* const out = first && blockIdx.y == 0 ? p.col.global_scale + part.matrix : nullptr;
        col_scale = form_scale(col, values, turned, out);
    } else if (col.is_present()) {
        clear_rest(p, left);
        if (part.group < 0) return;
        col_values = amax[part.group];
        float* const out = first && part.tile == 0 ? p.col.global_scale + part.group : nullptr;
        col_scale = form_scale(col, col_values, amax[2 * p.groups + part.group], out);
    }
    if (col.is_present() && !crosses) put_factors(col_scale, col_factors);
    u64 seed = 0, offset = 0;
    if (row.is_stochastic() || col.is_stochastic()) {
        seed = p.noise[0];
        offset = p.noise[1];
    }
    __syncthreads();

    Rows<8> rows(p.row, part, left / 16);
    Columns<8> columns(p.col, part, p.cols, left);
    Sectors<crosses> sectors(p.col, part, p.cols, left);
    if (values >= 0x7F800000u && row.is_present()) {  // the group may have none of what is not finite
        NVFP4_KEEP_LOOP
        for (int tiles = part.tiles(); tiles > 0; --tiles, rows.to_next_tile()) {
            NVFP4_KEEP_LOOP
            for (int half = 0; half < 2; ++half) {
                if (rows.has(half)) rows.store(half, Codes{}, 0);
            }
        }
    }
    if (col_values >= 0x7F800000u) {
        reader.left = 0;
        x[0] = x[1] = Run<T>{};
    }

    int turn = 0;
    for (int tiles = part.tiles(); tiles > 0; --tiles) {
        if (col.is_present() && !crosses) Tile<T>::store_rows(memory, x);
        if (row.is_present()) {
            Run<typename Taken<row_known, T>::Type> y[2];
            const auto copy = [&](Run<T> (&to)[2]) { to[0] = x[0], to[1] = x[1]; };
            Taken<row_known, T>::take(row, copy, y);
            u32 scale[2];
            scales_of<row_known, false>(row, row_scale, row_factors, y, scale);
            u32 noise[2][4] = {};
            draw(row, rows.block(0), rows.block(1), offset + static_cast<u64>(p.row.advance), seed, noise);
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) {
                const Codes made = encode(row, y[half], row_factors[scale[half]], noise[half]);
                if (rows.has(half)) rows.store(half, made, scale[half]);
                if (crosses) crossings[turn].put(half, made, scale[half]);
                load(half);  // on its way while the other half is worked at
            }
            rows.to_next_tile();
        } else {
            load(0);
            load(1);
        }
        reader.to_next_tile();
        if (!col.is_present()) continue;
        __syncthreads();
        if (crosses) {
            sectors.store(crossings[turn]);
            turn ^= 1;
        } else {
            Run<typename Taken<col_known, T>::Type> y[2];
            Taken<col_known, T>::take(col, [&](Run<T> (&to)[2]) { Tile<T>::load_columns(memory, to); }, y);
            u32 scale[2];
            scales_of<col_known, true>(col, col_scale, col_factors, y, scale);
            u32 noise[2][4] = {};
            draw(col, columns.block(0), columns.block(1), offset + static_cast<u64>(p.col.advance), seed, noise);
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) {
                staged.put(half, encode(col, y[half], col_factors[scale[half]], noise[half]), scale[half]);
            }
            columns.to_next_tile();
            __syncthreads();
            sectors.store(staged);
        }
        sectors.to_next_tile();
    }
}

// Either form or both in MXFP8, whose scales are the blocks' own: x is read once.
template <class T>
static __device__ __forceinline__ void quantize_mxfp8(const QuantizeLaunch& p) {
    using Magnitudes = u32[2][4][tile_side];
    NVFP4_DYNAMIC_SHARED(memory);  // a tile
    NVFP4_SHARED(Magnitudes, magnitudes);
    NVFP4_SHARED(Part, part);
    find_part(p, sizeof(typename T::Raw), part);
    const i64 left = static_cast<i64>(blockIdx.x) * tile_side;
    if (p.offsets != nullptr) {
        clear_rest(p, left);
        if (part.group < 0) return;
    }
    Reader<T, true> reader(p, part, left);
    Rows<16> rows(p.row, part, left / 16);
    Columns<16> columns(p.col, part, p.cols, left);
    int turn = 0;
    for (int tiles = part.tiles(); tiles > 0; --tiles) {
        Run<T> x[2];
        reader.load(0, x[0]);
        reader.load(1, x[1]);
        reader.to_next_tile();
        if (p.col.codes != nullptr) Tile<T>::store_rows(memory, x);
        if (p.row.codes != nullptr) {
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) {
                const u32 mine = bits(largest_of(x[half])).v, others = __shfl_xor_sync(all_lanes, mine, 8);
                const Bytes made = encode_mxfp8(x[half], mine > others ? mine : others);
                if (rows.has(half)) rows.store(half, made, block_of_lane() % 2 == 0);
            }
            rows.to_next_tile();
        }
        if (p.col.codes == nullptr) continue;
        __syncthreads();
        Tile<T>::load_columns(memory, x);
        const int warp = warp_index();
        u32 mine[2];
        NVFP4_UNROLL
        for (int half = 0; half < 2; ++half) {
            mine[half] = bits(largest_of(x[half])).v;
            magnitudes[turn][warp][32 * half + lane_index()] = mine[half];
        }
        __syncthreads();
        NVFP4_UNROLL
        for (int half = 0; half < 2; ++half) {
            const u32 others = magnitudes[turn][warp ^ 1][32 * half + lane_index()];
            const Bytes made = encode_mxfp8(x[half], mine[half] > others ? mine[half] : others);
            if (columns.has(half)) columns.store(half, made, warp % 2 == 0);
        }
        columns.to_next_tile();
        turn ^= 1;
    }
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
    u32 most = 0;  // of each value's place in a word
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
                for (int w = 0; w < 4; ++w) most = T::larger(most, v[i][w]);
            }
            continue;
        }
        const i64 end = begin + piece < p.cols ? begin + piece : p.cols;
        for (i64 j = begin + threadIdx.x; j < end; j += amax_threads) most = T::larger(most, line[j]);
    }
    const u32 found = block_largest<amax_threads / 32>(T::largest(most));
    if (threadIdx.x == 0) p.amax[blockIdx.z * 3 * p.programs + blockIdx.x] = found;
}

// Of the values and of the transforms of those forms that have one; of each group by itself, in whatever order its blocks come:
// the largest of them is the same.
template <class T>
static __device__ __forceinline__ void amax_of_transforms(const QuantizeLaunch& p) {
    NVFP4_DYNAMIC_SHARED(memory);  // a tile
    NVFP4_SHARED(Part, part);
    find_part(p, sizeof(typename T::Raw), part);
    Reader<T, true> reader(p, part, static_cast<i64>(blockIdx.x) * tile_side);
    u32 most = 0;  // of each value's place in a word
    float quarter[2] = {0.0f, 0.0f};
    for (int tiles = part.tiles(); tiles > 0; --tiles) {
        Run<T> x[2];
        reader.load(0, x[0]);
        reader.load(1, x[1]);
        reader.to_next_tile();
        NVFP4_UNROLL
        for (int half = 0; half < 2; ++half) {
            NVFP4_UNROLL
            for (int k = 0; k < Run<T>::words; ++k) most = T::larger(most, x[half].word[k]);
        }
        if (p.col.hadamard >= 0) Tile<T>::store_rows(memory, x);
        if (p.row.hadamard >= 0) quarter[0] = largest_turned(x, p.row, quarter[0]);
        if (p.col.hadamard < 0) continue;
        __syncthreads();
        Tile<T>::load_columns(memory, x);
        quarter[1] = largest_turned(x, p.col, quarter[1]);
        __syncthreads();
    }
    const u32 values = block_largest<tile_threads / 32>(T::largest(most));
    u32 turned[2];
    NVFP4_UNROLL
    for (int form = 0; form < 2; ++form) {
        const F32x1 rounded = round_bf16_saturating(F32x1(quarter[form]) * F32x1(4.0f));
        turned[form] = block_largest<tile_threads / 32>(bits(rounded).v);
    }
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

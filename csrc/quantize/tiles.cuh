// What a block of threads has of x, and how its 64 x 64 tiles get to the threads: rows straight from memory to registers, in
// whole blocks of 16 values, from there to shared memory, and columns from shared memory.
#pragma once
#include "arch/values.cuh"
#include "launch.h"

namespace nvfp4 {

constexpr int tile_side = 64, tile_threads = 128;

// The smaller of two, the second of which an int holds; not below 0.
static __device__ __forceinline__ int least_int(i64 a, i64 b) { return a < 0 ? 0 : static_cast<int>(a < b ? a : b); }

// What a block has of x: rows of all of it, of a matrix of a stack, or of one group. It lies in shared memory: one
// thread finds it.
struct Part {
    const void* x;             // where what it is part of begins
    const i64* index;          // which rows from there on are the part's; null: the first and those after it
    i64 rows;                  // of that
    i64 matrix, group;         // its number; 0 where there are none, group -1 for a block beyond all groups
    i64 tile, end;             // the block's tiles
    i64 row_first, col_first;  // blocks of 16 values that each form has before it
    i64 col_runs;              // blocks of 16 of its rows

    // Rows from the first of the block's tiles to the end of its last.
    __device__ __forceinline__ int rows_left() const { return least_int(rows - tile * tile_side, (end - tile) * tile_side); }
    // Blocks of a column from there on.
    __device__ __forceinline__ int runs_left() const { return least_int(col_runs - tile * 4, (end - tile) * 4); }
    __device__ __forceinline__ int tiles() const { return static_cast<int>(end - tile); }
};

// Blocks of 16 values that a line of a form has for so many of them.
static __device__ __forceinline__ i64 runs_of(const FormLaunch& f, i64 values) {
    return f.block == static_cast<i32>(Block::b1x32) ? (values + 31) / 32 * 2 : (values + 15) / 16;
}

// The group that a block has a part of. With S rows a block, the first block of group e is offsets[e] / S + e: the next
// group's is as many further as its rows need at least, so that nobody adds up groups, and rows / S + groups blocks are enough.
// Offsets that do not ascend give wrong parts of x, and none outside it.
static __device__ __forceinline__ void find_group(const QuantizeLaunch& p, i64 size, Part& part) {
    const u32 down = static_cast<u32>(p.tiles_down);
    const i64 place = static_cast<i64>(blockIdx.y);
    const auto offset = [&](i64 e) {
        const i64 given = p.offsets[e];
        return given < 0 ? 0 : given < p.rows ? given : p.rows;
    };
    const auto blocks_to = [&](i64 row) { return static_cast<i64>(static_cast<u32>(row / tile_side) / down); };  // of whole ones
    u32 found = 0;  // groups whose first block is here or before
    for (i64 e = threadIdx.x; e < p.groups; e += tile_threads) {
        if (blocks_to(offset(e)) + e <= place) found = static_cast<u32>(e) + 1;
    }
    found = block_largest<tile_threads / 32>(found);
    if (threadIdx.x != 0) return;
    part.group = static_cast<i64>(found) - 1;
    if (found == 0) {
        part.rows = part.tile = part.row_first = part.col_first = 0;
        return;
    }
    const i64 begin = offset(part.group), end = offset(part.group + 1), start = p.starts[part.group] / 16;
    const bool fits = begin < end && start >= 0 && start + runs_of(p.col, end - begin) <= p.col.runs;
    if (p.index != nullptr) part.index = p.index + begin;
    else part.x = static_cast<const unsigned char*>(p.x) + begin * p.row_stride * size;
    part.rows = fits ? end - begin : 0;
    part.tile = (place - blocks_to(begin) - part.group) * down;
    part.row_first = begin * p.row.runs;
    part.col_first = start;
}

static __device__ __forceinline__ void find_part(const QuantizeLaunch& p, i64 size, Part& part) {
    if (threadIdx.x == 0) {
        part.matrix = static_cast<i64>(blockIdx.z);
        part.group = 0;
        part.index = nullptr;
        part.x = static_cast<const unsigned char*>(p.x) + part.matrix * p.matrix_stride * size;
        part.rows = p.rows;
        part.tile = static_cast<i64>(blockIdx.y) * p.tiles_down;
        part.row_first = part.matrix * p.rows * p.row.runs;
        part.col_first = part.matrix * p.cols * p.col.runs;
    }
    if (p.offsets != nullptr) find_group(p, size, part);
    if (threadIdx.x == 0) {
        const i64 down = (part.rows + tile_side - 1) / tile_side;
        part.end = part.tile + p.tiles_down < down ? part.tile + p.tiles_down : down;
        part.col_runs = runs_of(p.col, part.rows);
    }
    __syncthreads();
}

// Sixteen values that follow one another, as they lie in memory.
template <class T>
struct Run {
    static constexpr int words = 16 / T::in_word;
    u32 word[words];
};

// Of a tile's values a thread has two blocks in either direction:
//   along rows      lane l of warp w: rows 16 w + l % 8 and 8 rows below, block l / 8: eight lanes hold a 16x16 tile
//   along columns   lane l of warp w: columns 8 (l % 4) + l / 4 and 32 columns on, rows 16 w .. 16 w + 15: 16 lanes hold a tile
static __device__ __forceinline__ int row_of_lane() { return 16 * warp_index() + (lane_index() & 7); }
static __device__ __forceinline__ int block_of_lane() { return lane_index() >> 3; }
static __device__ __forceinline__ int column_of_lane() { return 8 * (lane_index() & 3) + (lane_index() >> 2); }

// Rows of a part on their way to registers, tile after tile. gathers: whether the kernel can be given an index.
template <class T, bool gathers>
struct Reader {
    using Raw = typename T::Raw;

    const QuantizeLaunch& p;
    const i64* index;
    const Raw* at;       // the block in the first of the thread's rows of the tile, or of x, if there is an index
    int left;            // rows of the block of threads from that row on
    int inside;          // values of the block that x has
    const bool chunks;   // whether it is read by 16 bytes
    const i64 stride;    // from a row to the next

    __device__ __forceinline__ Reader(const QuantizeLaunch& p, const Part& part, i64 first_col)
        : p(p), index(gathers ? part.index : nullptr), left(part.rows_left() - row_of_lane()),
          inside(least_int(p.cols - first_col - 16 * block_of_lane(), 16)), chunks(p.wide && inside == 16), stride(p.row_stride) {
        const i64 row = part.tile * tile_side + row_of_lane();
        at = static_cast<const Raw*>(part.x) + first_col + 16 * block_of_lane();
        if (gathers && index != nullptr) index += row;
        else at += row * stride;
    }

    __device__ __forceinline__ void to_next_tile() {
        left -= tile_side;
        if (gathers && index != nullptr) index += tile_side;
        else at += tile_side * stride;
    }

    // The block in the first of the thread's rows, or 8 rows below; zeros outside x.
    __device__ __forceinline__ void load(int half, Run<T>& x) const {
        bool there = 8 * half < left;
        const Raw* from = at + 8 * half * stride;
        if (gathers && index != nullptr) {
            const i64 named = there ? index[8 * half] : -1;
            there = named >= 0 && named < p.tokens;
            from = at + named * stride;
        }
        NVFP4_UNROLL
        for (int i = 0; i < Run<T>::words; i += 4) load16_if(there && chunks, from + i * T::in_word, x.word + i);
        if (chunks || !there) return;
        NVFP4_UNROLL
        for (int j = 0; j < 16; ++j) {
            if (j < inside) x.word[j / T::in_word] |= static_cast<u32>(from[j]) << (16 * (j % T::in_word));
        }
    }
};

// A tile in shared memory. Of a row's 16-byte chunks each lies where XOR with a number of the row's sends it: so that eight rows
// of a chunk meet every bank once, and so do four chunks of a row and of the next.
template <class T>
struct Tile {
    static constexpr int row_bytes = tile_side * sizeof(typename T::Raw), bytes = tile_side * row_bytes;
    static constexpr int chunks = sizeof(typename T::Raw);  // of a block

    static __device__ __forceinline__ int place(int row, int chunk) {
        return row * row_bytes + ((chunk ^ ((row & 1) << 2 | (row >> 1 & 3))) << 4);
    }

    static __device__ __forceinline__ void store_rows(unsigned char* tile, const Run<T> (&x)[2]) {
        const int row = row_of_lane(), block = block_of_lane();
        NVFP4_UNROLL
        for (int i = 0; i < chunks; ++i) {
            unsigned char* const to = tile + place(row, block * chunks + i);
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) {  // 8 rows below, the chunk lies as here
                const u32* w = x[half].word + 4 * i;
                *reinterpret_cast<Chunk*>(to + 8 * half * row_bytes) = {w[0], w[1], w[2], w[3]};
            }
        }
    }

    static __device__ __forceinline__ void load_columns(const unsigned char* tile, Run<T> (&x)[2]) {
        const int lane = lane_index(), first = 16 * warp_index();
        if constexpr (T::in_word == 2) {
            // lane 8 m + 2 q + e names row 2 m + e in chunk q: of its column of chunk q a lane gets rows 2 m and 2 m + 1
            const unsigned char* const from = tile + place(first + 2 * (lane >> 3) + (lane & 1), lane >> 1 & 3);
            const unsigned char* const right = tile + place(first + 2 * (lane >> 3) + (lane & 1), 4 + (lane >> 1 & 3));
            load_matrices_transposed(x[0].word, from);
            load_matrices_transposed(x[0].word + 4, from + 8 * row_bytes);
            load_matrices_transposed(x[1].word, right);
            load_matrices_transposed(x[1].word + 4, right + 8 * row_bytes);
        } else {
            const int column = column_of_lane();
            NVFP4_UNROLL
            for (int half = 0; half < 2; ++half) {
                NVFP4_UNROLL
                for (int i = 0; i < 16; ++i) {
                    const unsigned char* const from = tile + place(first + i, 8 * half + column / 4);
                    x[half].word[i] = reinterpret_cast<const u32*>(from)[column % 4];
                }
            }
        }
    }
};

}  // namespace nvfp4

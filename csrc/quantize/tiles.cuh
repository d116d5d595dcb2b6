// 64 x 64 tiles of x on their way through shared memory: a block of 128 threads walks down a strip of x, two tiles in flight
// (cp.async) while it works at a third. Rows of a tile are rotated by XOR of their 16-byte chunks with the row's number, so
// that reading whole blocks along rows (8 lanes, 8 rows, one chunk each) and words along columns (32 lanes, one row) both
// meet every bank once.
#pragma once
#include "arch/values.cuh"
#include "launch.h"

namespace nvfp4 {

constexpr int tile_side = 64, tile_threads = 128, tile_stages = 3;

// What a block has of x: rows of all of it, of a matrix of a stack, or of one group. It lies in shared memory: the loop over
// tiles has no registers left for it.
struct Part {
    const void* x;             // where what it is part of begins
    const i64* index;          // which rows from there on are the part's; null: the first and those after it
    i64 rows;                  // of that
    i64 matrix, group;         // its number; 0 where there are none, group -1 for a block beyond all groups
    i64 tile, end;             // the block's tiles
    i64 row_first, col_first;  // blocks of 16 values that each form has before it
    i64 col_runs;              // blocks of 16 of its rows
};

// Blocks of 16 values that a line of a form has for so many of them.
static __device__ __forceinline__ i64 runs_of(const FormLaunch& f, i64 values) {
    return f.block == static_cast<i32>(Block::b1x32) ? (values + 31) / 32 * 2 : (values + 15) / 16;
}

// The group that a block has a part of. With S rows a block, the first block of group e is offsets[e] / S + e: the next
// group's is as many further as its rows need at least, so that nobody adds up groups, and rows / S + groups blocks are enough.
// Offsets that do not ascend give wrong parts of x, and none outside it.
static __device__ __forceinline__ void find_group(const QuantizeLaunch& p, i64 size, Part& part) {
    const i64 height = p.tiles_down * tile_side, place = static_cast<i64>(blockIdx.y);
    const auto offset = [&](i64 e) {
        const i64 given = p.offsets[e];
        return given < 0 ? 0 : given < p.rows ? given : p.rows;
    };
    u32 found = 0;  // groups whose first block is here or before
    for (i64 e = threadIdx.x; e < p.groups; e += tile_threads) {
        if (offset(e) / height + e <= place) found = static_cast<u32>(e) + 1;
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
    part.tile = (place - begin / height - part.group) * p.tiles_down;
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

// gathers: whether the kernel can be given an index.
template <class T, bool gathers = true>
struct TileRing {
    static constexpr int size = sizeof(typename T::Raw);
    static constexpr int chunks = tile_side * size / 16;  // of a row
    static constexpr int row_bytes = tile_side * size, bytes = tile_side * row_bytes;

    const QuantizeLaunch& p;
    unsigned char* memory;
    i64 col;
    const Part& part;

    static __device__ __forceinline__ int place(int row, int chunk) { return row * row_bytes + ((chunk ^ (row & 7)) << 4); }

    // Starts the loads of the tile whose first row is `row`, to stage `to`; zeros outside x.
    __device__ __forceinline__ void load(i64 row, int to) const {
        if (gathers && part.index != nullptr) {
            load(to, [&](int r) {
                const i64 named = row + r < part.rows ? part.index[row + r] : -1;
                return named < p.tokens ? named : -1;
            });
        } else {
            load(to, [&](int r) { return row + r < part.rows ? row + r : -1; });
        }
    }

    // place_of: the row of part.x that is row r of the tile, or less than 0 for none.
    template <class PlaceOf>
    __device__ __forceinline__ void load(int to, PlaceOf place_of) const {
        unsigned char* tile = memory + to * bytes;
        const auto* x = static_cast<const typename T::Raw*>(part.x);
        const int thread = static_cast<int>(threadIdx.x);
        if (p.wide) {
            constexpr int apart = tile_threads / chunks;  // of a thread's rows: a multiple of 8, so that each has its chunk at one place
            const int c = thread % chunks, r = thread / chunks;
            const i64 left = (p.cols - col) * size - c * 16;
            const int inside = left < 0 ? 0 : static_cast<int>(left < 16 ? left : 16);
            unsigned char* at = tile + place(r, c);
            x += col + c * (16 / size);
            NVFP4_UNROLL
            for (int i = 0; i < tile_side / apart; ++i) {
                const i64 from = place_of(r + i * apart);
                const bool there = from >= 0 && inside > 0;
                copy_async16(at + i * apart * row_bytes, there ? x + from * p.row_stride : p.x, there ? inside : 0);
            }
            return;
        }
        for (int at = thread; at < tile_side * tile_side; at += tile_threads) {
            const int r = at / tile_side, c = at % tile_side;
            const i64 from = place_of(r);
            auto* to_element = reinterpret_cast<typename T::Raw*>(tile + place(r, c * size / 16) + c * size % 16);
            *to_element = from >= 0 && col + c < p.cols ? x[from * p.row_stride + col + c] : static_cast<typename T::Raw>(0);
        }
    }

    // Calls work(tile, first row of it in the part) for each tile of the block. Every tile begins with a barrier.
    template <class Work>
    __device__ __forceinline__ void walk(Work work) const {
        const i64 first = part.tile, end = part.end;
        for (int i = 0; i < tile_stages - 1; ++i) {
            if (first + i < end) load((first + i) * tile_side, i);
            commit_copies();
        }
        int stage = 0;
        for (i64 tile = first; tile < end; ++tile) {
            wait_copies<tile_stages - 2>();
            __syncthreads();  // everybody's part of the tile is here, and everybody is done with the stage loaded next
            const i64 next = tile + tile_stages - 1;
            if (next < end) load(next * tile_side, stage == 0 ? tile_stages - 1 : stage - 1);
            commit_copies();
            work(memory + stage * bytes, tile * tile_side);
            stage = stage == tile_stages - 1 ? 0 : stage + 1;
        }
        wait_copies<0>();
    }
};

// A thread's part of a tile in either direction: two blocks of 16 values. Eight lanes hold a 16x16 tile.
//   along rows      lane l of warp w: rows 16 w + l % 8 and 8 rows below, block l / 8
//   along columns   lane l of warp w: columns 2 l and 2 l + 1, rows 16 w .. 16 w + 15
template <class T>
static __device__ __forceinline__ void row_blocks(const unsigned char* tile, F32x1 (&v)[2][16]) {
    constexpr int chunks = TileRing<T>::size, values = 16 / TileRing<T>::size;  // chunks of a block, values of a chunk
    const int lane = lane_index(), row = 16 * warp_index() + (lane & 7), block = lane >> 3;
    NVFP4_UNROLL
    for (int half = 0; half < 2; ++half) {
        NVFP4_UNROLL
        for (int i = 0; i < chunks; ++i) {
            const Chunk c = *reinterpret_cast<const Chunk*>(tile + TileRing<T>::place(row + 8 * half, block * chunks + i));
            F32x1* to = v[half] + i * values;
            T::widen(c.x, to);
            T::widen(c.y, to + T::in_word);
            T::widen(c.z, to + 2 * T::in_word);
            T::widen(c.w, to + 3 * T::in_word);
        }
    }
}

template <class T>
static __device__ __forceinline__ void col_blocks(const unsigned char* tile, F32x1 (&v)[2][16]) {
    const int at = 2 * lane_index() * TileRing<T>::size, chunk = at / 16, within = at % 16;
    NVFP4_UNROLL
    for (int i = 0; i < 16; ++i) {
        const auto* word = reinterpret_cast<const u32*>(tile + TileRing<T>::place(16 * warp_index() + i, chunk) + within);
        F32x1 pair[2];
        T::widen(word[0], pair);
        if (T::in_word == 1) T::widen(word[1], pair + 1);
        v[0][i] = pair[0];
        v[1][i] = pair[1];
    }
}

}  // namespace nvfp4

// Where a thread's blocks of a tile go: rows at once, columns by way of shared memory, until whole sectors of memory can be
// written. Nothing outside the matrix is.
#pragma once
#include "encode.cuh"

namespace nvfp4 {

// Where a thread's two blocks of a tile go, `size` bytes of codes each.
template <int size>
struct Blocks {
    u8 *codes, *scales;     // of the first block
    u64 number;             // that it has in the form
    const i64 step, apart;  // blocks of the form from a tile to the next, and from the first block to the second

    __device__ __forceinline__ Blocks(const FormLaunch& f, i64 at, i64 step, i64 apart)
        : codes(f.codes + at * size), scales(f.scales + scale(at)), number(static_cast<u64>(at)), step(step), apart(apart) {}
    static __device__ __forceinline__ i64 scale(i64 at) { return size == 16 ? at / 2 : at; }
    __device__ __forceinline__ void to_next_tile() {
        codes += step * size;
        scales += scale(step);
        number += static_cast<u64>(step);
    }
    __device__ __forceinline__ u64 block(int half) const { return half ? number + static_cast<u64>(apart) : number; }
    __device__ __forceinline__ void store(int half, const Codes& made, u32 scale) const {
        *reinterpret_cast<u64*>(codes + half * apart * size) = made.word[0] | static_cast<u64>(made.word[1]) << 32;
        scales[half * apart] = static_cast<u8>(scale);
    }
    // MXFP8: half a block, whose scale is the first half's to write.
    __device__ __forceinline__ void store(int half, const Bytes& made, bool first) const {
        *reinterpret_cast<Chunk*>(codes + half * apart * size) = {made.word[0], made.word[1], made.word[2], made.word[3]};
        if (first) scales[scale(half * apart)] = static_cast<u8>(made.scale);
    }
};

// The rows of a part's tiles.
template <int size>
struct Rows : Blocks<size> {
    int left;  // rows of the block of threads from this thread's first on; 0 where it has no block

    __device__ __forceinline__ Rows(const FormLaunch& f, const Part& part, i64 first_block)
        : Blocks<size>(f, part.row_first + (part.tile * tile_side + row_of_lane()) * f.runs + first_block + block_of_lane(),
                       tile_side * f.runs, 8 * f.runs),
          left(first_block + block_of_lane() < f.runs ? part.rows_left() - row_of_lane() : 0) {}
    __device__ __forceinline__ void to_next_tile() {
        Blocks<size>::to_next_tile();
        left -= tile_side;
    }
    __device__ __forceinline__ bool has(int half) const { return 8 * half < left; }
};

// The columns of a part's tiles, a thread's block by block.
template <int size>
struct Columns : Blocks<size> {
    int left;         // blocks of its lines from the thread's first on, not counted beyond those of the block of threads
    const int lines;  // from its first line on, likewise

    __device__ __forceinline__ Columns(const FormLaunch& f, const Part& part, i64 cols, i64 first_col)
        : Blocks<size>(f, part.col_first + (first_col + column_of_lane()) * f.runs + part.tile * 4 + warp_index(), 4, 32 * f.runs),
          left(part.runs_left() - warp_index()), lines(least_int(cols - first_col, tile_side) - column_of_lane()) {}
    __device__ __forceinline__ void to_next_tile() {
        Blocks<size>::to_next_tile();
        left -= 4;
    }
    __device__ __forceinline__ bool has(int half) const { return left > 0 && 32 * half < lines; }
};

// What the columns of a tile became, until whole memory sectors of it can be written. A column lies at `place` of it, and 4 words
// of padding send the two halves of its 32 bytes to different banks.
struct Staged {
    u64 codes[4][tile_side + 4];
    u8 scales[tile_side][4];

    static __device__ __forceinline__ int place(int column) { return column ^ (column >> 2 & 4); }
    __device__ __forceinline__ void put(int half, const Codes& made, u32 scale) {
        const int column = column_of_lane() + 32 * half;
        codes[warp_index()][place(column)] = made.word[0] | static_cast<u64>(made.word[1]) << 32;
        scales[column][warp_index()] = static_cast<u8>(scale);
    }
};

// The codes of a tile, whose rows become columns. Of a block of columns two rows lie side by side that are 32 apart, in odd blocks
// the other way round, and pairs of rows at places that send those which are read together to different banks.
struct alignas(16) Crossing {
    u64 codes[4][tile_side / 2][2];
    u8 scales[4][4];  // of a block of columns, of each block of rows

    static __device__ __forceinline__ int place(int row) { return (row & 31) ^ (row >> 2 & 6); }
    __device__ __forceinline__ void put(int half, const Codes& made, u32 scale) {
        const int row = row_of_lane() + 8 * half, block = block_of_lane();
        codes[block][place(row)][(row >> 5 ^ block) & 1] = made.word[0] | static_cast<u64>(made.word[1]) << 32;
        if (half == 0 && (lane_index() & 7) == 0) scales[block][warp_index()] = static_cast<u8>(scale);
    }
    // Lane 4 g + q of warp w: eight rows of four columns, a word for each: columns 16 w + 4 (g % 4) to 3 further on, rows 8 q to 7
    // further on of the half that `lower` says.
    static __device__ __forceinline__ bool lower() { return ((lane_index() >> 4 ^ warp_index()) & 1) != 0; }
    __device__ __forceinline__ void columns(u32 (&column)[4]) const {
        const int lane = lane_index();
        u32 rows[4];  // 2 m and 2 m + 1, four codes each
        load_matrices_transposed(rows, codes[warp_index()][place(8 * (lane >> 1 & 3) + 2 * (lane >> 3) + (lane & 1))]);
        NVFP4_UNROLL
        for (int i = 0; i < 2; ++i) {  // columns 2 i and 2 i + 1 are byte i of each row
            const u32 first = i ? bytes_of<0x7351u>(rows[0], rows[1]) : bytes_of<0x6240u>(rows[0], rows[1]);
            const u32 second = i ? bytes_of<0x7351u>(rows[2], rows[3]) : bytes_of<0x6240u>(rows[2], rows[3]);
            const u32 even = bytes_of<0x5410u>(first, second), odd = bytes_of<0x7632u>(first, second);
            column[2 * i] = (even & 0x0F0F0F0Fu) | (odd << 4 & 0xF0F0F0F0u);
            column[2 * i + 1] = (even >> 4 & 0x0F0F0F0Fu) | (odd & 0xF0F0F0F0u);
        }
    }
};

// Where the columns of a tile go, in whole sectors of memory: a thread has 16 bytes of codes from Staged, two blocks of a column, or
// from Crossing half of a block of each of four columns; the first 64 threads have a column's four scales.
template <bool crossing>
struct Sectors {
    u8 *codes, *scales;
    int left;              // blocks of its lines from the thread's on, not counted beyond those of the block of threads
    const i64 runs;        // from a line to the next
    const int lines;       // from the thread's first on, likewise
    const bool has_scales, pairs, fours;  // whether the thread's scales exist; whether blocks lie at multiples of so many

    static __device__ __forceinline__ int column() {
        return crossing ? 16 * warp_index() + 4 * (lane_index() >> 2 & 3) : static_cast<int>(threadIdx.x) >> 1;
    }
    static __device__ __forceinline__ int block() {
        return crossing ? 2 * Crossing::lower() + (lane_index() >> 1 & 1) : 2 * (static_cast<int>(threadIdx.x) & 1);
    }
    __device__ __forceinline__ Sectors(const FormLaunch& f, const Part& part, i64 cols, i64 first_col)
        : left(part.runs_left() - block()), runs(f.runs), lines(least_int(cols - first_col, tile_side) - column()),
          has_scales(threadIdx.x < tile_side && first_col + threadIdx.x < cols), pairs(((part.col_first | runs) & 1) == 0),
          fours(((part.col_first | runs) & 3) == 0) {
        const i64 first = part.col_first + part.tile * 4;
        codes = f.codes + (first + (first_col + column()) * runs + block()) * 8 + (crossing ? 4 * (lane_index() & 1) : 0);
        scales = f.scales + first + (first_col + threadIdx.x) * runs;
    }
    __device__ __forceinline__ void to_next_tile() {
        codes += 4 * 8;
        scales += 4;
        left -= 4;
    }
    __device__ __forceinline__ void store(const Staged& staged) const {
        const int place = Staged::place(column()), from = block();
        const u64 found[2] = {staged.codes[from][place], staged.codes[from + 1][place]};
        if (lines > 0 && pairs && left >= 2) {
            *reinterpret_cast<Chunk*>(codes) = {static_cast<u32>(found[0]), static_cast<u32>(found[0] >> 32), static_cast<u32>(found[1]),
                                                static_cast<u32>(found[1] >> 32)};
        } else if (lines > 0) {
            for (int i = 0; i < 2 && i < left; ++i) *reinterpret_cast<u64*>(codes + 8 * i) = found[i];
        }
        if (has_scales) store_scales(*reinterpret_cast<const u32*>(staged.scales[threadIdx.x]));
    }
    __device__ __forceinline__ void store(const Crossing& crossed) const {
        u32 column[4];
        crossed.columns(column);
        NVFP4_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i < lines && left > 0) *reinterpret_cast<u32*>(codes + i * runs * 8) = column[i];
        }
        if (has_scales) store_scales(*reinterpret_cast<const u32*>(crossed.scales[threadIdx.x >> 4]));
    }
    __device__ __forceinline__ void store_scales(u32 found) const {
        const int exist = left + block();
        if (fours && exist >= 4) {
            *reinterpret_cast<u32*>(scales) = found;
            return;
        }
        for (int i = 0; i < 4 && i < exist; ++i) scales[i] = static_cast<u8>(found >> (8 * i));
    }
};

}  // namespace nvfp4

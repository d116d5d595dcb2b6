// A few rows of a times an NVFP4 b: generation, bound by reading b's codes. No packing: each row of b is decoded in
// registers and multiplied at once. Codes come as 32-bit words of eight; instead of bringing the codes into the order of k,
// a's values are brought, once a call, into the order in which the codes fall out of the words.
#pragma once
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "kernel.h"
#include "operand.h"

namespace nvfp4 {
namespace NVFP4_ISA {

constexpr i64 few_rows = 8;        // rows that share one decoding of b
constexpr i64 most_few_rows = 32;  // beyond, packing b for the kernel of many rows is faster (measured at 4096 x 4096)
constexpr i64 run_values = 8 * F::lanes;  // values in one vector of codes

// Word l of a vector holds values 8 l .. 8 l + 7, nibble i being value 8 l + i: vector i of the run takes lanes 8 l + i.
template <class P>
struct Decoder;

template <>
struct Decoder<Single32> {
    static constexpr int vectors = 8;
    using Vector = F;
    static i64 position(i64 value) { return value % 8 * F::lanes + value / 8; }  // of a value of the run, in values
    static void decode(U codes, F* out) {
        for (int i = 0; i < 8; ++i) out[i] = lookup16(e2m1_values, codes >> (4 * i));
    }
};

#if defined(NVFP4_ISA_AVX512BF16)
template <>
struct Decoder<Pair16> {
    static constexpr int vectors = 4;
    using Vector = U;
    // 16-bit element h of the vector holds values 4 h .. 4 h + 3.
    static i64 position(i64 value) { return value % 4 * 32 + value / 4; }
    // The permutation reads five bits of an element, the fifth belonging to the next code: the table is there twice.
    static void decode(U codes, U* out) {
        alignas(64) static const u16 table[32] = {
            0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80,
            0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0, 0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040,
            0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};
        const __m512i values = _mm512_load_si512(table);
        for (unsigned i = 0; i < 4; ++i) out[i] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes.v, 4 * i), values);
    }
};
#endif

// The block scales of one row of b, each twice (a block is two words), zero from `blocks` on to the end of the last vector.
static inline void spread_scales(const u8* scales, i64 blocks, u32* out) {
    i64 i = 0;
    for (; i + F::lanes <= blocks; i += F::lanes) {
        const U s = bits(e4m3_decode<F>(load_bytes(scales + i)));
        store_pairs(out + 2 * i, s, s);
    }
    if (i < blocks) {
        const U s = bits(e4m3_decode<F>(load_some(scales + i, blocks - i)));
        store_pairs(out + 2 * i, s, s);
    }
}

// Adds runs of a[r] . b[row] to total[r], for `rows` rows of a already in the decoder's order.
template <class P, int rows>
static inline void dot_row(const typename P::Step* a, i64 a_stride, const u32* codes, const u32* scales, i64 runs, F* total) {
    using D = Decoder<P>;
    F sum[rows];
    for (int r = 0; r < rows; ++r) sum[r] = total[r];
    for (i64 i = 0; i < runs; ++i) {
        typename D::Vector b[D::vectors];
        D::decode(load(codes + i * F::lanes), b);
        const F scale = real(load(scales + i * F::lanes));
        for (int r = 0; r < rows; ++r) {
            const typename P::Step* at = a + r * a_stride + i * (D::vectors * F::lanes);
            F part[2] = {F(0.0f), F(0.0f)};  // two chains: half the latency
            for (int v = 0; v < D::vectors; ++v) part[v & 1] = dot(part[v & 1], load(at + v * F::lanes), b[v]);
            sum[r] = fma(part[0] + part[1], scale, sum[r]);
        }
    }
    for (int r = 0; r < rows; ++r) total[r] = sum[r];
}

template <class P>
static inline void dot_rows(i64 rows, const typename P::Step* a, i64 a_stride, const u32* codes, const u32* scales, i64 runs,
                            F* total) {
    switch (rows) {
        case 1: return dot_row<P, 1>(a, a_stride, codes, scales, runs, total);
        case 2: return dot_row<P, 2>(a, a_stride, codes, scales, runs, total);
        case 3: return dot_row<P, 3>(a, a_stride, codes, scales, runs, total);
        case 4: return dot_row<P, 4>(a, a_stride, codes, scales, runs, total);
        case 5: return dot_row<P, 5>(a, a_stride, codes, scales, runs, total);
        case 6: return dot_row<P, 6>(a, a_stride, codes, scales, runs, total);
        case 7: return dot_row<P, 7>(a, a_stride, codes, scales, runs, total);
        case 8: return dot_row<P, 8>(a, a_stride, codes, scales, runs, total);
        default: return;
    }
}

// Rows row .. row + m, columns `cols` of the result; done(sums, row, col, width) takes up to sixteen columns of a row.
// False: memory ran out.
template <class P, class Done>
static inline bool multiply_few_rows(const MatmulParams& p, i64 row, i64 m, Range cols, Done done) {
    using Step = typename P::Step;
    static thread_local Scratch scratch;
    const i64 blocks = p.b.cols / 16;
    // a's padding beyond b's would only meet zeros
    const i64 runs = (p.b.cols + run_values - 1) / run_values, whole = p.b.cols / run_values;
    const i64 padded = runs * run_values, a_stride = padded / P::values, run_steps = run_values / P::values;
    // All rows of a's part of a block of k stay in the first-level cache while sixteen columns pass by.
    const i64 fits = 24576 / (m * run_steps * 4), block_runs = fits > 2 ? fits / 2 * 2 : 2;  // even: whole blocks in scalar code
    char* memory = static_cast<char*>(scratch.get((m * a_stride + padded / 8 + 2 * F::lanes + padded + 64) * 4));
    if (!memory) return false;
    Step* a = reinterpret_cast<Step*>(memory);
    u32* scales = reinterpret_cast<u32*>(a + m * a_stride);
    Step* plain = reinterpret_cast<Step*>(scales + padded / 8 + 2 * F::lanes);

    constexpr i64 value_bytes = sizeof(Step) / P::values;
    i64 order[run_values];
    for (i64 i = 0; i < run_values; ++i) order[i] = Decoder<P>::position(i) * value_bytes;
    for (i64 r = 0; r < m; ++r) {
        read_row<P>(p.a, row + r, 0, padded, plain);
        for (i64 i = 0; i < runs; ++i) {
            const char* from = reinterpret_cast<const char*>(plain + i * run_steps);
            char* to = reinterpret_cast<char*>(a + r * a_stride + i * run_steps);
            for (i64 j = 0; j < run_values; ++j) __builtin_memcpy(to + order[j], from + j * value_bytes, value_bytes);
        }
    }
    for (i64 col = cols.begin; col < cols.end; col += 16) {
        alignas(64) float sums[few_rows][16];
        F total[16][few_rows];
        const i64 width = cols.end - col < 16 ? cols.end - col : 16;
        for (auto& column : total) {
            for (F& sum : column) sum = F(0.0f);
        }
        for (i64 run = 0; run < runs; run += block_runs) {
            const i64 end = run + block_runs < runs ? run + block_runs : runs;
            const i64 full = (end < whole ? end : whole) - run;  // the last run may be short of codes
            const i64 first_block = run * run_values / 16, last_block = end * run_values / 16;
            const Step* left = a + run * run_steps;
            for (i64 j = 0; j < width; ++j) {
                const u8* codes = static_cast<const u8*>(p.b.data) + (col + j) * (p.b.row_stride / 2) + run * (run_values / 2);
                spread_scales(p.b.scales + (col + j) * (p.b.row_stride / 16) + first_block,
                              (last_block < blocks ? last_block : blocks) - first_block, scales);
                dot_rows<P>(m, left, a_stride, reinterpret_cast<const u32*>(codes), scales, full, total[j]);
                if (full < end - run) {
                    alignas(64) u32 tail[F::lanes];
                    store(tail, load_some(reinterpret_cast<const u32*>(codes) + full * F::lanes, p.b.cols % run_values / 8));
                    dot_rows<P>(m, left + full * run_steps, a_stride, tail, scales + full * F::lanes, 1, total[j]);
                }
            }
        }
        for (i64 r = 0; r < m; ++r) {
            for (i64 j = 0; j < width; ++j) sums[r][j] = sum(total[j][r]);
            done(sums[r], row + r, col, width);
        }
    }
    return true;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

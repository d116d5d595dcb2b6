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

constexpr i64 few_rows = 8;               // rows that share one decoding of b
constexpr i64 most_few_rows = 32;         // beyond, packing b for the kernel of many rows is faster (measured at 4096 x 4096)
constexpr i64 run_values = 8 * F::lanes;  // values in one vector of codes
constexpr i64 ahead = 1024;               // words of codes to fetch; the hardware stops at the end of a page

// Word l of a vector holds values 8 l .. 8 l + 7. Element h of vector i of the decoded run is value `vectors` h + i.
template <class P>
struct Decoder;

template <>
struct Decoder<Single32> {
    static constexpr int vectors = 8;
    using Vector = F;
    using Value = float;
    static void decode(U codes, F* out) {
        for (int i = 0; i < 8; ++i) out[i] = lookup16(e2m1_values, codes >> (4 * i));
    }
};

#if defined(NVFP4_ISA_AVX512BF16)
template <>
struct Decoder<Pair16> {
    static constexpr int vectors = 4;
    using Vector = U;
    using Value = u16;
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

// A run of a in the decoder's order.
template <class P>
static inline void arrange(const typename P::Step* from, typename P::Step* to) {
    using D = Decoder<P>;
    constexpr i64 length = run_values / D::vectors;
    typename D::Value plain[run_values], arranged[run_values];
    __builtin_memcpy(plain, from, sizeof(plain));
    for (i64 i = 0; i < D::vectors; ++i) {
        for (i64 h = 0; h < length; ++h) arranged[i * length + h] = plain[h * D::vectors + i];
    }
    __builtin_memcpy(to, arranged, sizeof(arranged));
}

// Adds a[r] . b to total[16 r], or begins it, over `words` words of a row of b; rows of a in the decoder's order, run by run.
// A block is two words, so that a vector of scales serves two vectors of codes.
template <class P, int rows>
static inline void dot_row(const typename P::Step* a, const u32* codes, const u8* scales, i64 words, F* total, bool first) {
    using D = Decoder<P>;
    constexpr i64 lanes = F::lanes, run_steps = rows * D::vectors * lanes;
    F sum[rows];
    for (int r = 0; r < rows; ++r) sum[r] = first ? F(0.0f) : total[16 * r];
    const auto add = [&](U run, const u32* scale, const typename P::Step* at) {
        typename D::Vector b[D::vectors];
        D::decode(run, b);
        for (int r = 0; r < rows; ++r) {
            F part = F(0.0f);
            for (int v = 0; v < D::vectors; ++v) part = dot(part, load(at + (r * D::vectors + v) * lanes), b[v]);
            sum[r] = fma(part, real(load(scale)), sum[r]);
        }
    };
    alignas(64) u32 pairs[2 * lanes];
    i64 i = 0;
    for (; i + 2 * lanes <= words; i += 2 * lanes, a += 2 * run_steps) {
        const U scale = bits(e4m3_decode<F>(load_bytes(scales + i / 2)));
        store_pairs(pairs, scale, scale);
        for (i64 line = 0; line < 2 * lanes; line += 16) __builtin_prefetch(codes + i + ahead + line);
        add(load(codes + i), pairs, a);
        add(load(codes + i + lanes), pairs + lanes, a + run_steps);
    }
    if (i < words) {
        const i64 left = words - i;
        const U scale = bits(e4m3_decode<F>(load_some(scales + i / 2, left / 2)));
        store_pairs(pairs, scale, scale);
        add(load_some(codes + i, left < lanes ? left : lanes), pairs, a);
        if (left > lanes) add(load_some(codes + i + lanes, left - lanes), pairs + lanes, a + run_steps);
    }
    for (int r = 0; r < rows; ++r) total[16 * r] = sum[r];
}

// The same for `width` rows of b, from word `word` of each on.
template <class P, int rows>
static inline void dot_row_by_row(const Operand& b, i64 row, i64 width, i64 word, i64 words, const typename P::Step* a, F* total) {
    const u32* codes = static_cast<const u32*>(b.data) + word;
    for (i64 j = 0; j < width; ++j) {
        const i64 line = (row + j) * b.row_stride;
        dot_row<P, rows>(a, codes + line / 8, b.scales + line / 16 + word / 2, words, total + j, word == 0);
    }
}

template <class P>
static inline void dot_rows(i64 rows, const Operand& b, i64 row, i64 width, i64 word, i64 words, const typename P::Step* a,
                            F* total) {
    switch (rows) {
        case 1: return dot_row_by_row<P, 1>(b, row, width, word, words, a, total);
        case 2: return dot_row_by_row<P, 2>(b, row, width, word, words, a, total);
        case 3: return dot_row_by_row<P, 3>(b, row, width, word, words, a, total);
        case 4: return dot_row_by_row<P, 4>(b, row, width, word, words, a, total);
        case 5: return dot_row_by_row<P, 5>(b, row, width, word, words, a, total);
        case 6: return dot_row_by_row<P, 6>(b, row, width, word, words, a, total);
        case 7: return dot_row_by_row<P, 7>(b, row, width, word, words, a, total);
        case 8: return dot_row_by_row<P, 8>(b, row, width, word, words, a, total);
        default: return;
    }
}

// Rows row .. row + m, columns `cols` of the result; done(sums, row, col, width) takes up to sixteen columns of a row.
// False: memory ran out.
template <class P, class Done>
static inline bool multiply_few_rows(const MatmulParams& p, i64 row, i64 m, Range cols, Done done) {
    using Step = typename P::Step;
    static thread_local Scratch scratch;
    const i64 words = p.b.cols / 8, runs = (p.b.cols + run_values - 1) / run_values, run_steps = run_values / P::values;
    // All rows of a's part of a block of k stay in the first-level cache while sixteen columns pass by.
    const i64 fits = 24576 / (m * run_steps * 4), block_runs = fits > 2 ? fits / 2 * 2 : 2;  // even: whole vectors of scales
    Step* a = static_cast<Step*>(scratch.get((m + 1) * runs * run_steps * 4));
    if (!a) return false;
    Step* plain = a + m * runs * run_steps;
    for (i64 r = 0; r < m; ++r) {
        read_row<P>(p.a, row + r, 0, runs * run_values, plain);  // a's padding beyond b's would only meet zeros
        for (i64 i = 0; i < runs; ++i) arrange<P>(plain + i * run_steps, a + (i * m + r) * run_steps);
    }
    F total[few_rows][16];
    for (i64 r = 0; r < m; ++r) {
        for (F& sum : total[r]) sum = F(0.0f);
    }
    for (i64 col = cols.begin; col < cols.end; col += 16) {
        alignas(64) float sums[16];
        const i64 width = cols.end - col < 16 ? cols.end - col : 16;
        for (i64 run = 0; run < runs; run += block_runs) {
            const i64 word = run * F::lanes, most = block_runs * F::lanes;
            const i64 some = words - word < most ? words - word : most;
            dot_rows<P>(m, p.b, col, width, word, some, a + run * m * run_steps, total[0]);
        }
        for (i64 r = 0; r < m; ++r) {
            sums16(total[r], sums);
            done(sums, row + r, col, width);
        }
    }
    return true;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

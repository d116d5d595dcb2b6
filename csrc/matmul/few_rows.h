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

// Word l of a vector holds values 8 l .. 8 l + 7. Element h of vector i of the decoded run is value place(i, h). The vectors
// come in `parts`, each with scales of its own for its elements: spread gives those of two runs, whose blocks it takes.
struct InOrder {
    static constexpr int parts = 1;
    static void spread(U scale, u32* out) { store_pairs(out, scale, scale); }
};

template <class P>
struct Decoder;

#if defined(NVFP4_ISA_AVX2)
// By bytes, as a permutation of words takes three times the time of one within lanes: the two bytes of the values in bf16, of 32
// codes at once, and from pairs of these fp32. Part p holds bytes 8 p .. 8 p + 7 of each half, so two of the run's four blocks.
template <>
struct Decoder<Single32> {
    static constexpr int vectors = 8, parts = 2;
    using Vector = F;
    using Value = float;
    static constexpr i64 place(i64 i, i64 h) {
        const i64 part = i / 4, high_nibble = i / 2 % 2, odd = i % 2;
        return 2 * (h / 4 * 16 + part * 8 + h % 4 * 2 + odd) + high_nibble;
    }
    static void spread(U scale, u32* out) {
        for (int i = 0; i < 4; ++i) {
            const int first = i / 2 * 4 + i % 2, second = first + 2;
            const __m256i blocks = _mm256_setr_epi32(first, first, first, first, second, second, second, second);
            store(out + 8 * i, U(_mm256_permutevar8x32_epi32(scale.v, blocks)));
        }
    }
    static void decode(U codes, F* out) {
        const __m256i low = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64));
        const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, -128, -65, -65,
                                                                       -65, -64, -64, -64, -64));
        const __m256i nibble = _mm256_set1_epi8(15), upper = _mm256_set1_epi32(-65536);
        for (int n = 0; n < 2; ++n) {
            const __m256i index = _mm256_and_si256(n ? _mm256_srli_epi16(codes.v, 4) : codes.v, nibble);
            const __m256i lows = _mm256_shuffle_epi8(low, index), highs = _mm256_shuffle_epi8(high, index);
            const __m256i values[2] = {_mm256_unpacklo_epi8(lows, highs), _mm256_unpackhi_epi8(lows, highs)};
            for (int part = 0; part < 2; ++part) {
                out[4 * part + 2 * n] = real(U(_mm256_slli_epi32(values[part], 16)));
                out[4 * part + 2 * n + 1] = real(U(_mm256_and_si256(values[part], upper)));
            }
        }
    }
};
#elif defined(NVFP4_ISA_NEON)
// By bytes as well; a vector's sixteen bytes are two blocks, so that part p holds block p.
template <>
struct Decoder<Single32> {
    static constexpr int vectors = 8, parts = 2;
    using Vector = F;
    using Value = float;
    static constexpr i64 place(i64 i, i64 h) { return 2 * (i / 4 * 8 + 2 * h + i % 2) + i / 2 % 2; }
    static void spread(U scale, u32* out) {
        u32 block[F::lanes];
        store(block, scale);
        for (int i = 0; i < F::lanes; ++i) store(out + i * F::lanes, U(block[i]));
    }
    static void decode(U codes, F* out) {
        const uint8x16_t bytes = vreinterpretq_u8_u32(codes.v);
        const Sixteen values[2] = {e2m1_in_bf16(vandq_u8(bytes, vdupq_n_u8(15))), e2m1_in_bf16(vshrq_n_u8(bytes, 4))};
        for (int n = 0; n < 2; ++n) {
            for (int part = 0; part < 2; ++part) {
                const U pairs = vreinterpretq_u32_u16(values[n].half[part]);
                out[4 * part + 2 * n] = real(pairs << 16);
                out[4 * part + 2 * n + 1] = real(pairs & U(0xFFFF0000u));
            }
        }
    }
};
#else
template <>
struct Decoder<Single32> : InOrder {
    static constexpr int vectors = 8;
    using Vector = F;
    using Value = float;
    static constexpr i64 place(i64 i, i64 h) { return vectors * h + i; }
    static void decode(U codes, F* out) {
        for (int i = 0; i < 8; ++i) out[i] = lookup16(e2m1_values, codes >> (4 * i));
    }
};
#endif

#if defined(NVFP4_ISA_AVX512BF16)
template <>
struct Decoder<Pair16> : InOrder {
    static constexpr int vectors = 4;
    using Vector = U;
    using Value = u16;
    static constexpr i64 place(i64 i, i64 h) { return vectors * h + i; }
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
        for (i64 h = 0; h < length; ++h) arranged[i * length + h] = plain[D::place(i, h)];
    }
    __builtin_memcpy(to, arranged, sizeof(arranged));
}

// Adds a[r] . b to total[16 r], or begins it, over `words` words of a row of b; rows of a in the decoder's order, run by run.
// A block is two words, so that a vector of scales serves two vectors of codes.
template <class P, int rows>
static inline void dot_row(const typename P::Step* a, const u32* codes, const u8* scales, i64 words, F* total, bool first) {
    using D = Decoder<P>;
    constexpr i64 lanes = F::lanes, run_steps = rows * D::vectors * lanes, length = D::vectors / D::parts;
    F sum[rows];
    for (int r = 0; r < rows; ++r) sum[r] = first ? F(0.0f) : total[16 * r];
    const auto add = [&](U run, const u32* scale, const typename P::Step* at) {
        typename D::Vector b[D::vectors];
        D::decode(run, b);
        for (int r = 0; r < rows; ++r) {
            for (int p = 0; p < D::parts; ++p) {
                F part = F(0.0f);
                for (i64 v = p * length; v < (p + 1) * length; ++v) part = dot(part, load(at + (r * D::vectors + v) * lanes), b[v]);
                sum[r] = fma(part, real(load(scale + p * lanes)), sum[r]);
            }
        }
    };
    alignas(64) u32 spread[2 * D::parts * lanes];
    i64 i = 0;
    for (; i + 2 * lanes <= words; i += 2 * lanes, a += 2 * run_steps) {
        const U scale = bits(e4m3_decode<F>(load_bytes(scales + i / 2)));
        D::spread(scale, spread);
        for (i64 line = 0; line < 2 * lanes; line += 16) __builtin_prefetch(codes + i + ahead + line);
        add(load(codes + i), spread, a);
        add(load(codes + i + lanes), spread + D::parts * lanes, a + run_steps);
    }
    if (i < words) {
        const i64 left = words - i;
        const U scale = bits(e4m3_decode<F>(load_some(scales + i / 2, left / 2)));
        D::spread(scale, spread);
        add(load_some(codes + i, left < lanes ? left : lanes), spread, a);
        if (left > lanes) add(load_some(codes + i + lanes, left - lanes), spread + D::parts * lanes, a + run_steps);
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

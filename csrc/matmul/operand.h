// Operands as the kernels read them: rows of steps, a step being one fp32 value, or two bf16 values for the bf16 dot product.
// Codes are decoded with the block scale alone, which is exact in bf16 (at most 6 significant bits).
#pragma once
#include "cpu/decode.h"
#include "params.h"

namespace nvfp4 {
namespace NVFP4_ISA {

struct Single32 {  // fp32 steps
    using Step = float;
    static constexpr int values = 1;
    static Step zero() { return 0.0f; }
    static void put16(const float* from, float* to) { widen16(reinterpret_cast<const Single*>(from), to); }
};

#if defined(NVFP4_ISA_AVX512BF16)
struct Pair16 {  // bf16 pairs
    using Step = u32;
    static constexpr int values = 2;
    static Step zero() { return 0; }
    static void put16(const float* from, u32* to) {
        const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(from)), 16);  // exact values: truncation
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
    }
};
#endif

static inline bool exact_in_bf16(const Operand& x) { return x.kind != Kind::fp32 && x.kind != Kind::fp16; }

// Sixteen values x[row, k .. k + 16], zero beyond the stored columns.
static inline void values16(const Operand& x, i64 row, i64 k, float* out) {
    const i64 inside = x.cols - k;
    if (inside <= 0) {
        for (int i = 0; i < 16; ++i) out[i] = 0.0f;
        return;
    }
    const u8* bytes = static_cast<const u8*>(x.data);
    switch (x.kind) {
        case Kind::nvfp4:
            return decode_nvfp4(bytes + (row * x.cols + k) / 2, e4m3_value(x.scales[(row * x.cols + k) / 16]), out);
        case Kind::mxfp8:
            return decode_e4m3(bytes + row * x.cols + k, e8m0_value(x.scales[row * (x.cols / 32) + k / 32]), out);
        default: break;
    }
    const int count = static_cast<int>(inside < 16 ? inside : 16);
    const i64 at = row * x.row_stride + k * x.col_stride;
    const auto plain = [&](auto* data) {
        if (x.col_stride == 1 && count == 16) {
            widen16(data + at, out);
        } else {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
            T run[16] = {};
            for (int i = 0; i < count; ++i) run[i] = data[at + i * x.col_stride];
            widen16(run, out);
        }
    };
    if (x.kind == Kind::fp32) return plain(static_cast<const Single*>(x.data));
    if (x.kind == Kind::fp16) return plain(static_cast<const Half*>(x.data));
    return plain(static_cast<const Brain*>(x.data));
}

// Rows row .. row + count of x, values k .. k + length (a multiple of 16), to `out`, `stride` steps from row to row.
template <class P>
static inline void read_rows(const Operand& x, i64 row, i64 count, i64 k, i64 length, typename P::Step* out, i64 stride) {
    alignas(64) float values[16];
    for (i64 r = 0; r < count; ++r) {
        for (i64 j = 0; j < length; j += 16) {
            values16(x, row + r, k + j, values);
            P::put16(values, out + r * stride + j / P::values);
        }
    }
}

// Rows of b, sixteen at a time, transposed: out[step * width + column], for the kernel's vertical loads. Columns beyond b's
// rows are zero.
template <class P>
static inline void pack_columns(const Operand& b, i64 row, i64 count, i64 k, i64 length, typename P::Step* out, i64 width,
                                typename P::Step* buffer) {
    using Step = typename P::Step;
    const i64 steps = length / P::values;
    alignas(64) float turned[16][16];
    alignas(64) float tile[16][16];
    for (i64 g = 0; g < count; g += 16) {
        const i64 rows = count - g < 16 ? count - g : 16;
        read_rows<P>(b, row + g, rows, k, length, buffer, steps);
        for (i64 i = rows * steps; i < 16 * steps; ++i) buffer[i] = P::zero();
        for (i64 s = 0; s < steps; s += 8) {  // a run of 16 bf16 values is 8 steps
            const i64 n = steps - s < 16 ? steps - s : 16;
            for (int i = 0; i < 16; ++i) __builtin_memcpy(tile[i], buffer + i * steps + s, static_cast<size_t>(n) * 4);
            transpose16(tile, turned);
            for (i64 i = 0; i < n; ++i) __builtin_memcpy(out + (s + i) * width + g, turned[i], sizeof(Step) * 16);
            if (n == 16) s += 8;
        }
    }
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// grouped_matmul on the CPU. All columns of all groups stand in one line, sixteen a unit, and each thread takes a stretch of it of
// equal cost: so one loop serves any load, an expert with all rows as well as many with few. A group without rows costs nothing.
#include "params.h"

#include <atomic>
#include <mutex>

#include "cpu/pages.h"
#include "cpu/scratch.h"
#include "matmul/columns.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

// Decoding or packing one row of b takes about as long as its products with this many rows of a.
constexpr i64 packing = 24;

// x from a place on that lies `values` values later in memory, whole blocks where it is quantized.
Operand later(const Operand& x, i64 values) {
    constexpr i64 halves[] = {8, 4, 4, 2, 1, 2};  // of a byte, by kind
    Operand moved = x;
    moved.data = static_cast<const char*>(x.data) + values * halves[static_cast<int>(x.kind)] / 2;
    if (x.scales) moved.scales = x.scales + values / (x.kind == Kind::nvfp4 ? 16 : 32);
    return moved;
}

// x from row `first` on.
Operand later_rows(const Operand& x, i64 first) {
    if (!x.row_index) return later(x, first * x.row_stride);
    Operand moved = x;
    moved.row_index += first;
    return moved;
}

// The columns of group e: where it has starts, to its last block's end.
Operand columns(const Operand& x, const i64* starts, const i64* offsets, i64 e) {
    const i64* from = starts ? starts : offsets;
    Operand part = later(x, x.col_index ? 0 : from[e] * (starts ? 1 : x.col_stride));
    if (x.col_index) part.col_index += from[e];
    part.cols = from[e + 1] - from[e];
    if (x.global_scale) part.global_scale = x.global_scale + e;
    return part;
}

// The product of group e.
MatmulParams group(const GroupedMatmulParams& p, i64 e) {
    const i64 first = p.offsets[e], count = p.offsets[e + 1] - first;
    MatmulParams one{p.a, p.b, nullptr, 0, nullptr, p.out_dtype, false, p.relu2, 1};
    const i64 out_bytes = p.out_dtype == fp32 ? 4 : 2;
    if (p.sums) {
        one.a = columns(p.a, p.a_starts, p.offsets, e);
        one.b = columns(p.b, p.b_starts, p.offsets, e);
        one.out = static_cast<char*>(p.out) + e * p.a.rows * p.b.rows * out_bytes;
        return one;
    }
    one.a = later_rows(p.a, first);
    one.a.rows = count;
    one.out = static_cast<char*>(p.out) + first * p.b.rows * out_bytes;
    one.b = later(p.b, e * p.b_stride);
    if (p.b.global_scale) one.b.global_scale = p.b.global_scale + e;
    return one;
}

// The same from row `first` on, for a thread that writes amax and turned there.
Squares squares(const GroupedMatmulParams& p, i64 first, float* sums, u32* amax, float* turned) {
    const i64 n = p.b.rows, bytes = first * n * (p.out_dtype == fp32 ? 4 : 2);
    const Squares& all = *p.squares;
    const auto later = [&](auto* from, i64 by) { return from ? from + by : nullptr; };
    return {later(static_cast<const char*>(all.h), bytes), later(static_cast<char*>(all.made), bytes), later(all.weights, first),
            later(sums, first * ((n + 15) / 16)), p.amax ? amax : nullptr, p.turned ? turned : nullptr, all.signs};
}

// Whether each group's rows fit between its starts, which are whole blocks within the columns of x.
bool room(const Operand& x, const i64* starts, const GroupedMatmulParams& p) {
    if (!starts) return true;
    bool fits = starts[0] == 0 && starts[p.groups] <= x.cols;
    for (i64 e = 0; e < p.groups; ++e) {
        const i64 length = starts[e + 1] - starts[e];
        fits = fits && length % (x.kind == Kind::nvfp4 ? 16 : 32) == 0 && length >= p.offsets[e + 1] - p.offsets[e];
    }
    return fits;
}

// What sixteen columns of group e cost: its products, and reading b. Of sums divided, a group without rows is zeros to write.
i64 unit_cost(const GroupedMatmulParams& p, i64 e) {
    const i64 count = p.offsets[e + 1] - p.offsets[e];
    if (p.sums) return (count + 1) * (p.a.rows + packing);
    return count ? count + packing : 0;
}

template <class P>
int run(const GroupedMatmulParams& p) {
    const i64 units = (p.b.rows + 15) / 16;
    i64 total = 0;
    for (i64 e = 0; e < p.groups; ++e) total += unit_cost(p, e) * units;
    const i64 products = (p.sums ? p.a.rows * p.a.cols : p.a.rows * p.b.cols) * p.b.rows;
    std::atomic<bool> failed{false};
    std::mutex shared;
    Scratch room;
    float* const sums = p.dweights ? static_cast<float*>(room.get(p.a.rows * units * 4)) : nullptr;
    if (p.dweights && !sums) return 1;
    auto body = [&](int t, int n) {
        const i64 begin = total * t / n, end = total * (t + 1) / n;
        i64 start = 0;  // where the group's units begin
        for (i64 e = 0; e < p.groups && start < end; ++e) {
            const i64 cost = unit_cost(p, e), from = begin - start, to = end - start;
            start += cost * units;
            if (cost == 0 || start <= begin) continue;
            // A unit belongs to the thread in whose stretch it begins.
            const i64 first = from <= 0 ? 0 : (from + cost - 1) / cost, last = at_most((to + cost - 1) / cost, units);
            MatmulParams one = group(p, e);
            alignas(64) u32 amax[16] = {};
            alignas(64) float turned[16] = {};
            Squares made;
            if (p.squares) {
                made = squares(p, p.offsets[e], sums, amax, turned);
                one.squares = &made;
            }
            const Range cols{first * 16, at_most(last * 16, p.b.rows)};
            if (p.offsets[e + 1] == p.offsets[e]) {
                no_products(one, 1.0f, cols);
            } else if (!multiply_cols<P>(one, combined_scale(one), at_most(one.a.cols, one.b.cols), cols)) {
                failed = true;
            }
            if (p.amax) {
                const std::lock_guard<std::mutex> lock(shared);
                for (const u32 most : amax) p.amax[e] = most > p.amax[e] ? most : p.amax[e];
                for (const float most : turned) {
                    if (p.turned) p.turned[e] = most > p.turned[e] ? most : p.turned[e];
                }
            }
        }
    };
    const int threads = static_cast<int>(at_most(p.threads, products / (1 << 19) + 1));
    parallel(threads, body);
    if (p.dweights) {
        auto add = [&](int t, int n) {
            const Range rows = part(p.a.rows, 1, t, n);
            for (i64 row = rows.begin; row < rows.end; ++row) {
                float sum = 0.0f;
                for (i64 unit = 0; unit < units; ++unit) sum += sums[row * units + unit];
                p.dweights[row] = sum;
            }
        };
        parallel(threads, add);
    }
    return failed;
}

}  // namespace

int grouped_matmul(const GroupedMatmulParams& p) {
#if defined(NVFP4_ISA_AVX512BF16)
    if (!exact_in_bf16(p.a) || !exact_in_bf16(p.b)) return avx512::grouped_matmul(p);
#endif
    const DefaultFloats floats;
    bool ascend = p.offsets[0] == 0;
    if (!p.sums) ascend = ascend && p.offsets[p.groups] == p.a.rows;
    if (p.sums && !p.a_starts) ascend = ascend && p.offsets[p.groups] == p.a.cols;
    if (p.sums && !p.b_starts) ascend = ascend && p.offsets[p.groups] == p.b.cols;
    for (i64 e = 0; e < p.groups; ++e) ascend = ascend && p.offsets[e] <= p.offsets[e + 1];
    if (!ascend) return 2;
    if (!room(p.a, p.a_starts, p) || !room(p.b, p.b_starts, p)) return 3;
    if (p.a.rows == 0 || p.b.rows == 0 || p.groups == 0) return 0;
    use_large_pages(p.out, (p.sums ? p.groups : 1) * p.a.rows * p.b.rows * (p.out_dtype == fp32 ? 4 : 2));
    return run<Steps>(p);
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

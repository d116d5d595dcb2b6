// matmul on the CPU: rectangles of the result, shared among threads.
#include "params.h"

#include <atomic>

#include "cpu/pages.h"
#include "rectangle.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

// How the threads share the result: `down` x `across` rectangles.
struct Split {
    int down, across;
};

// The split under which the busiest thread has least to do: its share of the products, and the decoding of its rows of both
// operands (about as long, for one row, as 64 columns' products).
Split split(i64 m, i64 n, int threads) {
    Split best{1, threads};
    double least_cost = 1e300;
    for (int down = 1; down <= threads; ++down) {
        if (threads % down) continue;
        const double rows = static_cast<double>(ceil_to((m + down - 1) / down, kernel_rows));
        const int across = threads / down;
        const double cols = static_cast<double>(ceil_to((n + across - 1) / across, 16));
        const double cost = rows * cols / 64 + (rows + cols);
        if (cost < least_cost) {
            least_cost = cost;
            best = {down, across};
        }
    }
    return best;
}

template <class P>
int run(const MatmulParams& p, float g, i64 k) {
    const i64 m = p.a.rows, n = p.b.rows;
    const i64 products = m * n * k;
    const i64 most = products / (1 << 20) + 1;  // a million products take some microseconds
    const int threads = static_cast<int>(at_most(p.threads, most));
    std::atomic<bool> failed{false};
    if (few<P>(p)) {
        auto body = [&](int t, int count) {
            if (!multiply_cols<P>(p, g, k, part(n, 16, t, count))) failed = true;
        };
        parallel(threads, body);
        return failed;
    }
    auto body = [&](int t, int count) {
        const Split s = split(m, n, count);
        const Range rows = part(m, kernel_rows, t / s.across, s.down), cols = part(n, 16, t % s.across, s.across);
        if (rows.begin < rows.end && cols.begin < cols.end && !rectangle<P>(p, g, k, rows, cols)) failed = true;
    };
    parallel(threads, body);
    return failed;
}

}  // namespace

template bool multiply_cols<Steps>(const MatmulParams&, float, i64, Range);

int matmul(const MatmulParams& p) {
#if defined(NVFP4_ISA_AVX512BF16)
    if (!exact_in_bf16(p.a) || !exact_in_bf16(p.b)) return avx512::matmul(p);
#endif
    const DefaultFloats floats;
    const i64 k = p.a.cols > p.b.cols ? p.a.cols : p.b.cols;
    const float g = combined_scale(p);
    if (p.a.rows == 0 || p.b.rows == 0) return 0;
    use_large_pages(p.out, p.a.rows * p.b.rows * (p.out_dtype == fp32 ? 4 : 2));
    if (k == 0) {
        no_products(p, g, {0, p.b.rows});
        return 0;
    }
    return run<Steps>(p, g, k);
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

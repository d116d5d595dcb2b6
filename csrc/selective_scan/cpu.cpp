// selective_scan on the CPU: threads take blocks of heads of a sequence, one after the other, the longest sequences first.
// No result depends on who takes what.
#include "params.h"

#include <atomic>
#include <cstdlib>

#include "cpu/threads.h"
#include "backward.h"
#include "forward.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

int threads_for(const ScanParams& p, i64 products) {
    const i64 most = p.rows * p.length * p.heads * p.head_dim * p.state * products / (1 << 20) + 1;
    return static_cast<int>(at_most(p.threads, most));
}

// Runs body(i) for i < works on `threads` threads; true when one of them returned false.
template <class Body>
bool share(i64 works, int threads, Body body) {
    std::atomic<i64> next{0};
    std::atomic<bool> failed{false};
    auto take = [&](int, int) {
        const FlushSubnormals floats;
        for (i64 i; (i = next.fetch_add(1)) < works;) {
            if (!body(i)) failed = true;
        }
    };
    parallel(static_cast<int>(at_most(threads, works)), take);
    return failed;
}

#if defined(NVFP4_ISA_AVX512BF16)
bool in_bf16(const ScanParams& p) { return p.x.dtype == bf16 && p.B.dtype == bf16 && p.C.dtype == bf16; }
#endif

// Partial sums of all pieces of work; null pointers when memory ran out.
class Partials {
public:
    Partials(const ScanParams& p, i64 blocks, bool skip) {
        const i64 each = p.rows * p.length * p.groups * p.state, heads = p.count * p.heads;
        for (int pass = 0; pass < 2; ++pass) {
            Pieces pieces(memory);
            sums.dA = pieces.take<double>(heads);
            sums.ddt_bias = pieces.take<double>(heads);
            sums.dD = pieces.take<float>(skip ? heads * p.head_dim : 0);
            sums.dB = pieces.take<float>(blocks > 1 ? blocks * each : 0);
            sums.dC = pieces.take<float>(blocks > 1 ? blocks * each : 0);
            if (pass == 0 && !(memory = std::aligned_alloc(64, static_cast<size_t>(pieces.used + 64)))) return;
        }
        if (blocks == 1) sums.dB = sums.dC = nullptr;
    }
    Partials(const Partials&) = delete;
    ~Partials() { std::free(memory); }
    Partial sums{};
    void* memory = nullptr;
};

// to[i] = the sum over blocks of from[block * count + i], in order, for i of a range.
void add_blocks(const float* from, i64 blocks, i64 count, Range range, int dtype, void* to) {
    with_dtype(dtype, [&](auto* type) {
        auto* out = static_cast<decltype(type)>(to);
        for (i64 i = range.begin; i < range.end; i += 16) {
            const int width = static_cast<int>(at_most(range.end - i, 16));
            F total[vectors16];
            for (int v = 0; v < vectors16; ++v) total[v] = F(0.0f);
            for (i64 block = 0; block < blocks; ++block) {
                alignas(64) float values[16];
                widen_some(reinterpret_cast<const Single*>(from + block * count + i), 1, width, values);
                for (int v = 0; v < vectors16; ++v) total[v] = total[v] + load(values + v * F::lanes);
            }
            store_some(total, out + i, width);
        }
    });
}

// to[i] = the sum over sequences of from[sequence * count + i], in order.
template <class T>
void add_sequences(const T* from, i64 sequences, i64 count, Range range, float* to) {
    for (i64 i = range.begin; i < range.end; ++i) {
        double total = 0.0;
        for (i64 s = 0; s < sequences; ++s) total += from[s * count + i];
        to[i] = static_cast<float>(total);
    }
}

}  // namespace

int selective_scan(const ScanParams& p) {
#if defined(NVFP4_ISA_AVX512BF16)
    if (!in_bf16(p)) return avx512::selective_scan(p);
#endif
    // Each block of heads forms C B^T for itself; eight make that cheap, fewer keep all threads busy.
    const int threads = threads_for(p, 2);
    i64 heads = 8;
    while (heads > 1 && Division(p, heads).works(p) < 2 * threads) heads /= 2;
    const Division division(p, heads);
    return share(division.works(p), threads, [&](i64 i) { return forward<Steps>(p, division.work(p, i)); });
}

int selective_scan_backward(const ScanBackwardParams& p) {
#if defined(NVFP4_ISA_AVX512BF16)
    if (!in_bf16(p.scan)) return avx512::selective_scan_backward(p);
#endif
    // Blocks are summed one after the other, so their heads must not depend on the number of threads.
    const ScanParams& f = p.scan;
    const int threads = threads_for(f, 5);
    const Division division(f, f.heads < 32 ? 4 : 8);
    const Partials partials(f, division.blocks, p.dD != nullptr);
    if (!partials.memory) return 1;
    const Partial& sums = partials.sums;
    const int failed = share(division.works(f), threads, [&](i64 i) {
        return backward<Steps>(p, division.work(f, i), i % division.blocks, sums);
    });
    auto finish = [&](int t, int n) {
        const FlushSubnormals floats;
        const i64 each = f.rows * f.length * f.groups * f.state;
        if (sums.dB) {
            add_blocks(sums.dB, division.blocks, each, part(each, 16, t, n), f.B.dtype, p.dB);
            add_blocks(sums.dC, division.blocks, each, part(each, 16, t, n), f.C.dtype, p.dC);
        }
        add_sequences(sums.dA, f.count, f.heads, part(f.heads, 16, t, n), p.dA);
        add_sequences(sums.ddt_bias, f.count, f.heads, part(f.heads, 16, t, n), p.ddt_bias);
        if (p.dD) add_sequences(sums.dD, f.count, f.heads * f.head_dim, part(f.heads * f.head_dim, 16, t, n), p.dD);
    };
    if (!failed) parallel(threads, finish);
    return failed;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// The experts' kernels without Python: route, router_logits, permute, relu2, grouped_matmul, expert_mlp and moe_step on each
// instruction set against double, in buffers of exactly the promised size; three threads give the bytes that one gives.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "checks.h"
#include "expert_mlp/params.h"
#include "grouped_matmul/params.h"
#include "moe_step/params.h"
#include "numerics/e4m3.h"
#include "permute/params.h"
#include "relu2/params.h"
#include "route/params.h"
#include "router_logits/params.h"

namespace nvfp4 {
namespace {

using Floats = std::vector<float>;
using Longs = std::vector<i64>;

std::mt19937 draw(11);

size_t count(i64 n) { return static_cast<size_t>(n); }

// Multiples of 1/16 below 2, exact in bf16.
Floats numbers(i64 n) {
    Floats made(count(n));
    for (auto& v : made) v = static_cast<float>(static_cast<int>(draw() % 63) - 31) / 16.0f;
    return made;
}

std::vector<u16> halves(const Floats& from) {
    std::vector<u16> made(from.size());
    for (size_t i = 0; i < from.size(); ++i) {
        u32 b;
        std::memcpy(&b, &from[i], 4);
        made[i] = static_cast<u16>(b >> 16);
    }
    return made;
}

bool near(const Floats& got, const std::vector<double>& exact, double bound) {
    double off = 0, size = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
        off += (got[i] - exact[i]) * (got[i] - exact[i]);
        size += exact[i] * exact[i];
    }
    return std::sqrt(off) <= bound * std::sqrt(size) + 1e-30;
}

struct Routed {
    Longs indices, offsets, inverse, order;
    Floats weights;
};

Routed routed(const Floats& logits, const Floats& bias, i64 tokens, i64 experts, i64 top_k, i64 groups, int threads) {
    Routed r{Longs(count(tokens * top_k)), Longs(count(experts + 1)), Longs(count(tokens * top_k)), Longs(count(tokens * top_k)),
             Floats(count(tokens * top_k))};
    const RouteParams p{logits.data(), bias.data(), tokens, experts, top_k, groups, groups > 1 ? groups - 1 : 1, 2.5f, true,
                        r.indices.data(), r.weights.data(), r.offsets.data(), r.inverse.data(), r.order.data(), threads};
    expect(NVFP4_CALL(route, p) == 0, "route status");
    return r;
}

void routes(i64 tokens, i64 experts, i64 top_k, i64 groups) {
    const Floats logits = numbers(tokens * experts), bias = numbers(experts), dweights = numbers(tokens * top_k);
    const Routed r = routed(logits, bias, tokens, experts, top_k, groups, 1);
    const Routed again = routed(logits, bias, tokens, experts, top_k, groups, 3);
    expect(r.order == again.order && r.weights == again.weights && r.offsets == again.offsets, "route depends on the threads");
    const i64 slots = tokens * top_k;
    for (i64 row = 0; row < slots; ++row) {
        const i64 slot = r.order[count(row)], e = r.indices[count(slot)];
        expect(r.inverse[count(slot)] == row && r.offsets[count(e)] <= row && row < r.offsets[count(e + 1)], "order", row, slot);
        expect(row == r.offsets[count(e)] || r.order[count(row - 1)] < slot, "stable order", row, slot);
    }
    Floats dlogits(count(tokens * experts));
    RouteParams inputs{};
    inputs.logits = logits.data(), inputs.bias = bias.data(), inputs.tokens = tokens, inputs.experts = experts;
    inputs.top_k = top_k, inputs.groups = groups, inputs.top_groups = groups > 1 ? groups - 1 : 1;
    inputs.scale = 2.5f, inputs.normalize = true, inputs.threads = 2;
    const RouteBackwardParams p{inputs, dweights.data(), dlogits.data()};
    expect(NVFP4_CALL(route_backward, p) == 0, "route_backward status");
    for (i64 t = 0; t < tokens; ++t) {
        const auto score = [&](i64 e) { return 1 / (1 + std::exp(-static_cast<double>(logits[count(t * experts + e)]))); };
        double sum = 0, mean = 0;
        for (i64 c = 0; c < top_k; ++c) sum += score(r.indices[count(t * top_k + c)]);
        for (i64 c = 0; c < top_k; ++c) {
            const i64 slot = t * top_k + c;
            const double w = score(r.indices[count(slot)]) / sum;
            expect(std::fabs(r.weights[count(slot)] - 2.5 * w) < 1e-5, "weights", t, c);
            mean += dweights[count(slot)] * w;
        }
        std::vector<double> wanted(count(experts));
        for (i64 c = 0; c < top_k; ++c) {
            const i64 e = r.indices[count(t * top_k + c)];
            const double s = score(e);
            wanted[count(e)] = 2.5 * (dweights[count(t * top_k + c)] - mean) / sum * s * (1 - s);
        }
        for (i64 e = 0; e < experts; ++e) {
            expect(std::fabs(dlogits[count(t * experts + e)] - wanted[count(e)]) < 1e-5, "dlogits", t, e);
        }
    }
}

// One stack of matrices, plain or NVFP4, and its values.
struct Matrices {
    i64 groups, rows, cols;
    bool quantized;
    Floats values;
    std::vector<u16> plain;
    std::vector<u8> codes, scales;
    Floats global;

    Matrices(i64 groups_, i64 rows_, i64 cols_, bool quantized_) : groups(groups_), rows(rows_), cols(cols_), quantized(quantized_) {
        values = numbers(groups * rows * cols);
        if (!quantized) {
            plain = halves(values);
            return;
        }
        static const float grid[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
        codes.resize(values.size() / 2), scales.resize(values.size() / 16), global = numbers(groups);
        for (auto& c : codes) c = static_cast<u8>(draw());
        for (auto& s : scales) s = static_cast<u8>(draw() % 127);
        for (size_t i = 0; i < values.size(); ++i) {
            const u32 code = codes[i / 2] >> (i % 2 * 4) & 15;
            const float scale = e4m3_decode<F32x1>(U32x1(scales[i / 16])).v;
            values[i] = (code < 8 ? grid[code] : -grid[code - 8]) * scale * global[i / count(rows * cols)];
        }
    }
    Operand operand() const {
        if (quantized) return {Kind::nvfp4, codes.data(), scales.data(), global.data(), rows, cols, cols, 0};
        return {Kind::bf16, plain.data(), nullptr, nullptr, rows, cols, cols, 1};
    }
    // Of the transposes.
    Operand turned() const { return {Kind::nvfp4, codes.data(), scales.data(), global.data(), cols, rows, 1, cols}; }
};

// y [rows, n] in double of a [rows, k] and the matrix of each row's group.
std::vector<double> product(const std::vector<double>& a, const Matrices& b, const Longs& offsets, bool turned = false) {
    const i64 n = turned ? b.cols : b.rows, length = turned ? b.rows : b.cols;
    std::vector<double> y(count(offsets.back() * n));
    for (i64 e = 0; e < b.groups; ++e) {
        for (i64 r = offsets[count(e)]; r < offsets[count(e + 1)]; ++r) {
            for (i64 j = 0; j < n; ++j) {
                double sum = 0;
                for (i64 k = 0; k < length; ++k) {
                    const i64 row = turned ? k : j, col = turned ? j : k;
                    sum += a[count(r * length + k)] * b.values[count((e * b.rows + row) * b.cols + col)];
                }
                y[count(r * n + j)] = sum;
            }
        }
    }
    return y;
}

int grouped(const GroupedMatmulParams& p) { return NVFP4_CALL_BF16(grouped_matmul, p); }

void grouped_products(const Longs& offsets, i64 n, i64 k, bool quantized, bool turned = false) {
    const i64 groups = static_cast<i64>(offsets.size()) - 1, rows = offsets.back();
    const Matrices b(groups, turned ? k : n, turned ? n : k, quantized);
    const Floats a = numbers(rows * k);
    const std::vector<u16> narrow = halves(a);
    const std::vector<double> exact = product({a.begin(), a.end()}, b, offsets, turned);
    for (bool wide : {false, true}) {
        const Operand left{wide ? Kind::fp32 : Kind::bf16, wide ? static_cast<const void*>(a.data()) : narrow.data(), nullptr, nullptr,
                           rows, k, k, 1};
        Floats y(count(rows * n)), again(y.size());
        GroupedMatmulParams p{left, turned ? b.turned() : b.operand(), offsets.data(), groups, n * k, false, y.data(), 0, false, 1};
        expect(grouped(p) == 0, "grouped_matmul status");
        p.out = again.data(), p.threads = 3;
        grouped(p);
        expect(y == again, "grouped_matmul depends on the threads", n, k);
        expect(near(y, exact, 2e-6), "grouped_matmul", n, k);
    }
}

// The largest magnitude of the transform along each sixteen of `rows` rows of n values, zeros below the last, in fp64.
double largest_turned(const float* x, i64 rows, i64 n, u32 signs) {
    double most = 0;
    for (i64 run = 0; run < rows; run += 16) {
        for (i64 at = 0; at < 16 * n; ++at) {
            double sum = 0;
            for (i64 r = 0; r < std::min<i64>(16, rows - run); ++r) {
                const bool minus = (__builtin_popcountll(static_cast<u64>(at / n & r)) + (signs >> r)) & 1;
                sum += (minus ? -0.25 : 0.25) * x[(run + r) * n + at % n];
            }
            most = std::max(most, std::fabs(sum));
        }
    }
    return most;
}

// Forward the squares beside the product, backward relu2's derivative in its place, in fp32, with each group's largest magnitudes.
void grouped_squares(const Longs& offsets, i64 n, i64 k, bool quantized) {
    const i64 groups = static_cast<i64>(offsets.size()) - 1, rows = offsets.back();
    const Matrices b(groups, n, k, quantized);
    const Floats a = numbers(rows * k), h = numbers(rows * n), weights = numbers(rows);
    const std::vector<double> d = product({a.begin(), a.end()}, b, offsets, false);
    const Operand left{Kind::fp32, a.data(), nullptr, nullptr, rows, k, k, 1};
    for (bool backward : {false, true}) {
        std::vector<double> squares(count(rows * n)), dh(squares.size()), dweights(count(rows));
        Floats y(squares.size()), made(y.size()), sums(dweights.size());
        std::vector<u32> amax(count(groups)), wanted(amax.size());
        Floats turned(amax.size());
        const u32 signs = 0xD7E8;
        Squares all{backward ? h.data() : nullptr, made.data(), weights.data(), nullptr, nullptr, nullptr, signs};
        GroupedMatmulParams p{left, b.operand(), offsets.data(), groups, n * k, false, y.data(), 0, false, 3};
        p.squares = &all, p.dweights = backward ? sums.data() : nullptr, p.amax = amax.data();
        p.turned = turned.data();
        expect(grouped(p) == 0, "grouped squares status");
        for (size_t i = 0; i < squares.size(); ++i) {
            const size_t row = i / count(n);
            const double r = std::max(backward ? h[i] : y[i], 0.0f);
            squares[i] = r * r * weights[row], dh[i] = 2 * r * weights[row] * d[i], dweights[row] += r * r * d[i];
        }
        for (i64 e = 0; e < groups; ++e) {
            for (size_t i = count(offsets[e] * n); i < count(offsets[e + 1] * n); ++i) {
                const float magnitude = std::fabs(backward ? y[i] : made[i]);
                u32 bits;
                std::memcpy(&bits, &magnitude, 4);
                wanted[count(e)] = std::max(wanted[count(e)], bits);
            }
            const float* first = (backward ? y : made).data() + offsets[count(e)] * n;
            const double most = largest_turned(first, offsets[count(e + 1)] - offsets[count(e)], n, signs);
            expect(std::fabs(turned[count(e)] - most) <= most / 256, "grouped squares' turned amax", n, k);
        }
        expect(near(made, squares, 2e-6) && near(y, backward ? dh : d, 2e-6), "grouped squares", n, k);
        expect(amax == wanted && (!backward || near(sums, dweights, 2e-6)), "grouped squares' amax and sums", n, k);
    }
}

// Of x's columns in order, or of those that an index names.
void divided_sums(const Longs& offsets, i64 m, i64 n, bool gathered) {
    const i64 groups = static_cast<i64>(offsets.size()) - 1, rows = offsets.back();
    const Floats dy = numbers(rows * m), x = numbers(rows * n);
    const std::vector<u16> a = halves(dy), b = halves(x);
    Longs index(count(rows));
    for (i64 r = 0; r < rows; ++r) index[count(r)] = gathered ? static_cast<i64>(draw()) % rows : r;
    std::vector<double> exact(count(groups * m * n));
    for (i64 e = 0; e < groups; ++e) {
        for (i64 r = offsets[count(e)]; r < offsets[count(e + 1)]; ++r) {
            const float* line = x.data() + index[count(r)] * n;
            for (i64 i = 0; i < m * n; ++i) exact[count(e * m * n + i)] += dy[count(r * m + i / n)] * line[i % n];
        }
    }
    for (bool wide : {false, true}) {
        const Operand left{wide ? Kind::fp32 : Kind::bf16, wide ? static_cast<const void*>(dy.data()) : a.data(), nullptr, nullptr, m,
                           rows, 1, m};
        const Operand right{wide ? Kind::fp32 : Kind::bf16, wide ? static_cast<const void*>(x.data()) : b.data(), nullptr, nullptr, n,
                            rows, 1, n, nullptr, gathered ? index.data() : nullptr};
        Floats y(exact.size());
        const GroupedMatmulParams p{left, right, offsets.data(), groups, 0, true, y.data(), 0, false, 3};
        expect(grouped(p) == 0, "divided sums status");
        expect(near(y, exact, 2e-6), "divided sums", m, n);
    }
}

void experts(i64 tokens, i64 num, i64 top_k, i64 size, i64 width) {
    const Routed r = routed(numbers(tokens * num), numbers(num), tokens, num, top_k, 1, 1);
    const Matrices up(num, width, size, true), down(num, size, width, false);
    const Floats x = numbers(tokens * size);
    const i64 rows = tokens * top_k;
    std::vector<double> gathered(count(rows * size)), exact(count(tokens * size));
    for (i64 i = 0; i < rows * size; ++i) gathered[count(i)] = x[count(r.order[count(i / size)] / top_k * size + i % size)];
    std::vector<double> hidden = product(gathered, up, r.offsets);
    for (auto& h : hidden) h = h > 0 ? h * h : 0;
    const std::vector<double> made = product(hidden, down, r.offsets);
    for (i64 i = 0; i < rows * size; ++i) {
        const i64 slot = r.order[count(i / size)];
        exact[count(slot / top_k * size + i % size)] += r.weights[count(slot)] * made[count(i)];
    }
    Longs token(count(rows));
    Floats rooms[2] = {Floats(count(rows * width)), Floats(count(rows * size))}, y(exact.size());
    const Operand inner{Kind::fp32, x.data(), nullptr, nullptr, rows, size, size, 1, token.data()};
    const Operand middle{Kind::fp32, rooms[0].data(), nullptr, nullptr, rows, width, width, 1};
    ExpertMlpParams p{{inner, up.operand(), r.offsets.data(), num, width * size, false, rooms[0].data(), 0, true, 2},
                      {middle, down.operand(), r.offsets.data(), num, size * width, false, rooms[1].data(), 0, false, 2},
                      top_k, token.data(), r.weights.data(), r.inverse.data(), r.order.data(), y.data(), 2};
    expect(NVFP4_CALL_BF16(expert_mlp, p) == 0, "expert_mlp status");
    expect(near(y, exact, 2e-6), "expert_mlp", size, width);
    const Longs beyond(count(rows), rows);
    p.order = beyond.data();
    expect(rows == 0 || NVFP4_CALL_BF16(expert_mlp, p) == 2, "expert_mlp takes rows out of range");

    // permute and unpermute of the same slots, x's rows apart
    Floats apart(count(tokens ? (tokens - 1) * (size + 3) + size : 0)), out(count(tokens * size)), sorted(count(rows * size));
    for (i64 i = 0; i < tokens * size; ++i) apart[count(i / size * (size + 3) + i % size)] = x[count(i)];
    PermuteParams q{};
    q.x = apart.data(), q.row_stride = size + 3, q.tokens = tokens, q.top_k = top_k, q.features = size, q.threads = 3;
    q.order = r.order.data(), q.inverse = r.inverse.data(), q.rows = sorted.data(), q.out = out.data();
    expect(NVFP4_CALL(permute, q) == 0 && near(sorted, gathered, 0), "permute", tokens, size);
    expect(NVFP4_CALL(unpermute, q) == 0, "unpermute status");
    Floats dy(count(rows * size)), dweights(count(rows)), dout = numbers(tokens * size);
    q.weights = r.weights.data(), q.dout = dout.data(), q.drows = dy.data(), q.dweights = dweights.data();
    expect(NVFP4_CALL(unpermute_backward, q) == 0, "unpermute_backward status");
    for (i64 i = 0; i < tokens * size; ++i) {
        const i64 slot = i / size * top_k;
        expect(std::fabs(out[count(i)] - static_cast<float>(top_k) * x[count(i)]) < 1e-5, "unpermute", i);
        for (i64 c = slot; c < slot + top_k; ++c) {
            const float got = dy[count(r.inverse[count(c)] * size + i % size)];
            expect(std::fabs(got - r.weights[count(c)] * dout[count(i)]) < 1e-6, "unpermute_backward", i, c);
        }
    }
}

void squares(i64 rows, i64 features) {
    const Floats x = numbers(rows * features), dy = numbers(rows * features), weights = numbers(rows);
    Floats y(x.size()), dx(x.size()), dweights(count(rows));
    const Relu2Params p{x.data(), weights.data(), rows, features, 0, y.data(), dy.data(), dx.data(), dweights.data(), 3};
    expect(NVFP4_CALL(relu2, p) == 0 && NVFP4_CALL(relu2_backward, p) == 0, "relu2 status");
    std::vector<double> sums(count(rows));
    for (i64 i = 0; i < rows * features; ++i) {
        const size_t at = count(i), row = count(i / features);
        const float r = std::max(x[at], 0.0f);
        expect(y[at] == r * r * weights[row] && dx[at] == dy[at] * r * (2 * weights[row]), "relu2", i);
        sums[row] += r * r * dy[at];
    }
    expect(near(dweights, sums, 1e-6), "dweights", rows, features);
}

// Rows of x are `apart` values longer than they are read.
void logits(i64 tokens, i64 hidden, i64 experts, i64 apart) {
    const Floats x = numbers(tokens * (hidden + apart)), weight = numbers(experts * hidden), slopes = numbers(tokens * experts);
    const std::vector<u16> narrow = halves(x);
    std::vector<double> exact(slopes.size()), of_x(count(tokens * hidden)), of_weight(weight.size());
    for (i64 t = 0; t < tokens; ++t) {
        for (i64 e = 0; e < experts; ++e) {
            const size_t at = count(t * experts + e);
            for (i64 k = 0; k < hidden; ++k) {
                const double value = x[count(t * (hidden + apart) + k)], w = weight[count(e * hidden + k)];
                exact[at] += value * w;
                of_x[count(t * hidden + k)] += slopes[at] * w;
                of_weight[count(e * hidden + k)] += slopes[at] * value;
            }
        }
    }
    for (int threads : {1, 3}) {
        Floats out(exact.size()), dx(of_x.size()), dweight(weight.size());
        RouterLogitsParams p{narrow.data(), weight.data(), tokens, hidden, experts, hidden + apart, 2, out.data(), nullptr, nullptr,
                             nullptr, threads};
        expect(NVFP4_CALL(router_logits, p) == 0 && near(out, exact, 1e-6), "router_logits", tokens, hidden);
        p.x = x.data(), p.dtype = 0, p.dlogits = slopes.data(), p.dx = dx.data(), p.dweight = dweight.data();
        expect(NVFP4_CALL(router_logits_backward, p) == 0, "router_logits_backward status");
        expect(near(dx, of_x, 1e-6) && near(dweight, of_weight, 1e-6), "router_logits_backward", tokens, hidden);
    }
}

// A block of experts, with a latent width of `size` and a shared expert where those are not 0.
void steps(i64 tokens, i64 hidden, i64 num, i64 top_k, i64 size, i64 width, i64 shared) {
    const i64 inner = size ? size : hidden;
    const Matrices up(num, width, inner, true), down(num, inner, width, false), fc1(1, size, hidden, false);
    const Matrices fc2(1, hidden, size, true), shared_up(1, shared, hidden, true), shared_down(1, hidden, shared, false);
    const Floats x = numbers(tokens * hidden), router = numbers(num * hidden), bias = numbers(num);
    const Longs all{0, tokens};
    Floats scores(count(tokens * num)), y(x.size());
    const RouterLogitsParams q{x.data(), router.data(), tokens, hidden, num, hidden, 0, scores.data(), nullptr, nullptr, nullptr, 1};
    expect(NVFP4_CALL(router_logits, q) == 0, "router_logits status");
    const Routed r = routed(scores, bias, tokens, num, top_k, 1, 1);
    const auto squared = [](std::vector<double> values) {
        for (auto& h : values) h = h > 0 ? h * h : 0;
        return values;
    };
    const std::vector<double> wide{x.begin(), x.end()}, tokens_in = size ? product(wide, fc1, all) : wide;
    std::vector<double> gathered(count(tokens * top_k * inner)), mixed(count(tokens * inner));
    const auto slot_of = [&](size_t i) { return r.order[i / count(inner)]; };
    const auto at = [&](size_t i) { return count(slot_of(i) / top_k * inner) + i % count(inner); };
    for (size_t i = 0; i < gathered.size(); ++i) gathered[i] = tokens_in[at(i)];
    const std::vector<double> made = product(squared(product(gathered, up, r.offsets)), down, r.offsets);
    for (size_t i = 0; i < made.size(); ++i) mixed[at(i)] += r.weights[count(slot_of(i))] * made[i];
    std::vector<double> exact = size ? product(mixed, fc2, all) : mixed;
    const std::vector<double> beside = product(squared(product(wide, shared_up, all)), shared_down, all);
    for (size_t i = 0; shared && i < exact.size(); ++i) exact[i] += beside[i];
    const Operand none{}, in{Kind::fp32, x.data(), nullptr, nullptr, tokens, hidden, hidden, 1};
    for (int threads : {1, 3}) {
        const MoeStepParams p{in, router.data(), bias.data(), num, top_k, 1, 1, 2.5f, true, up.operand(), down.operand(),
                              width * inner, inner * width, size ? fc1.operand() : none, size ? fc2.operand() : none,
                              shared ? shared_up.operand() : none, shared ? shared_down.operand() : none, y.data(), threads};
        expect(NVFP4_CALL_BF16(moe_step, p) == 0 && near(y, exact, 5e-6), "moe_step", tokens, hidden);
    }
}

}  // namespace

void experts_everywhere() {
    for (const char* name : {"scalar", "avx2", "avx512", "avx512bf16"}) {
        if (!set_isa(name)) continue;
        routes(1, 5, 2, 1), routes(40, 33, 6, 1), routes(9, 24, 4, 4), routes(3, 7, 7, 1), routes(0, 4, 1, 1);
        for (bool quantized : {false, true}) {
            grouped_products({0, 5, 5, 22, 23}, 33, 80, quantized);
            grouped_products({0, 0, 70, 70}, 130, 48, quantized);
            grouped_products({0, 12, 25}, 17, 1856, quantized);
            grouped_products({0, 0}, 5, 16, quantized);
            grouped_squares({0, 5, 5, 22, 63}, 33, 80, quantized), grouped_squares({0, 2}, 530, 320, quantized);
            if (quantized) grouped_products({0, 5, 5, 22, 23}, 80, 33, true, true);
            if (quantized) grouped_products({0, 0, 70, 70}, 48, 1856, true, true);
        }
        for (bool gathered : {false, true}) {
            divided_sums({0, 5, 5, 22, 23}, 48, 33, gathered), divided_sums({0, 140, 140}, 5, 70, gathered);
            divided_sums({0, 0}, 3, 3, gathered);
        }
        experts(17, 8, 3, 48, 80), experts(1, 4, 2, 80, 16), experts(0, 4, 2, 16, 16), experts(70, 3, 3, 32, 48);
        logits(1, 1, 1, 0), logits(17, 131, 6, 5), logits(37, 48, 129, 0), logits(300, 70, 3, 2), logits(0, 5, 3, 0);
        steps(1, 80, 4, 2, 48, 16, 32), steps(17, 48, 8, 3, 0, 80, 16), steps(40, 64, 3, 3, 32, 48, 0), steps(0, 16, 2, 1, 16, 16, 16);
        squares(1, 1), squares(17, 48), squares(3, 130), squares(0, 4), squares(4, 0);
    }
}

}  // namespace nvfp4

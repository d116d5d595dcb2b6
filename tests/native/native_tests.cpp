// The kernels without Python: definitions against brute force, then every op on odd shapes, all instruction sets against the
// scalar one, in buffers of exactly the promised size. `make sanitize` runs this under address and undefined-behaviour checks.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "checks.h"
#include "dequantize/params.h"
#include "exp_tests.h"
#include "hadamard/params.h"
#include "matmul/params.h"
#include "numerics/block_scale.h"
#include "numerics/hadamard.h"
#include "numerics/mxfp8.h"
#include "numerics/philox.h"
#include "quantize/params.h"
#include "selective_scan/params.h"
#include "state_update/params.h"

using namespace nvfp4;

namespace {

const double grid[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};

// Index of the nearest of `count` ascending values, ties to the even index, the last for anything beyond it.
int nearest(double x, const double* values, int count) {
    if (x >= values[count - 1]) return count - 1;
    int best = 0;
    for (int i = 1; i < count; ++i) {
        const double d = std::fabs(x - values[i]), e = std::fabs(x - values[best]);
        if (d < e || (d == e && i % 2 == 0)) best = i;
    }
    return best;
}

float from_bits(u32 b) {
    float x;
    std::memcpy(&x, &b, 4);
    return x;
}

void definitions() {
    double e4m3[127];
    for (int i = 0; i < 127; ++i) {
        e4m3[i] = i < 8 ? std::ldexp(i, -9) : std::ldexp(8 + i % 8, i / 8 - 10);
        expect(e4m3_decode<F32x1>(U32x1(static_cast<u32>(i))).v == e4m3[i], "e4m3_decode", i);
        expect(e4m3_decode<F32x1>(U32x1(static_cast<u32>(i) | 128)).v == -e4m3[i], "e4m3_decode negative", i);
    }
    expect(std::isnan(e4m3_decode<F32x1>(U32x1(127)).v) && std::isnan(e4m3_decode<F32x1>(U32x1(255)).v), "e4m3 NaN");
    std::mt19937 random(1);
    std::vector<float> samples = {0, 0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5, 6, 7, 448, 449, 1e38f, 1e-38f, 1e-42f};
    for (int i = 0; i < 126; ++i) samples.push_back(static_cast<float>((e4m3[i] + e4m3[i + 1]) / 2));
    for (int i = 0; i < 20000; ++i) samples.push_back(std::ldexp(static_cast<float>(random() % 65536), static_cast<int>(random() % 26) - 24));
    for (float x : samples) {
        for (float y : {x, std::nextafter(x, 0.0f), std::nextafter(x, HUGE_VALF)}) {
            const u32 sign = std::signbit(y) ? 8 : 0;
            expect(e2m1_nearest(F32x1(y)).v == (static_cast<u32>(nearest(std::fabs(y), grid, 8)) | sign), "e2m1_nearest");
            expect(e2m1_nearest(F32x1(-y)).v == (static_cast<u32>(nearest(std::fabs(y), grid, 8)) | (8 - sign)), "-e2m1_nearest");
            expect(static_cast<int>(e4m3_encode(F32x1(y)).v & 127) == nearest(std::fabs(y), e4m3, 127), "e4m3_encode");
            int low = 7;
            while (grid[low] > std::fabs(y)) --low;
            const double step = low < 4 ? 0.5 : low < 6 ? 1 : 2;
            const int share = low == 7 ? 0 : static_cast<int>(std::floor((std::fabs(y) - grid[low]) / step * 256));
            for (u32 r : {0u, 1u, 127u, 128u, 255u, static_cast<u32>(random() % 256)}) {
                const int code = low + (static_cast<int>(r) + share >= 256);
                expect(e2m1_stochastic(F32x1(y), U32x1(r)).v == (static_cast<u32>(code) | sign), "e2m1_stochastic", r);
            }
        }
    }
    for (u32 i = 0; i < 16; ++i) {
        expect(e2m1_decode<F32x1>(U32x1(i)).v == (i < 8 ? grid[i] : -grid[i - 8]), "e2m1_decode", i);
    }
    for (int i = 0; i < 20000; ++i) {
        const float amax = std::fabs(from_bits(static_cast<u32>(random()) & 0x7F7FFFFFu));
        const int e = static_cast<int>(e8m0_encode(F32x1(amax)).v) - 127;
        expect(amax <= std::ldexp(448.0, e), "e8m0 too small", e);
        expect(e == -127 || amax > std::ldexp(448.0, e - 1), "e8m0 too large", e);
        expect(e8m0_decode<F32x1>(U32x1(static_cast<u32>(e + 127))).v == std::ldexp(1.0, e), "e8m0_decode", e);
        expect(e8m0_inverse<F32x1>(U32x1(static_cast<u32>(e + 127))).v == std::ldexp(1.0, -e), "e8m0_inverse", e);
    }
    const Draw<U32x1> draw = philox(U32x1(0x243F6A88u), U32x1(0x85A308D3u), 0x0370734413198A2Eull, 0x299F31D0A4093822ull);
    const u32 known[4] = {0xD16CFE09u, 0x94FDCCEBu, 0x5001E420u, 0x24126EA1u};  // Random123's kat_vectors
    for (int i = 0; i < 4; ++i) expect(draw.word[i].v == known[i], "philox", i);
    F32x1 run[16];
    for (int i = 0; i < 16; ++i) run[i] = F32x1(static_cast<float>(i * i - 40));
    hadamard16(run, 0xD7E8);
    for (int j = 0; j < 16; ++j) {  // integers below 256 and quarters of them are exact in bf16 unless they are large
        double exact = 0;
        for (int i = 0; i < 16; ++i) {
            exact += (i * i - 40) * (0xD7E8 >> i & 1 ? -1 : 1) * (__builtin_popcount(static_cast<unsigned>(i & j)) % 2 ? -1 : 1) / 4.0;
        }
        expect(std::fabs(run[j].v - exact) <= std::fabs(exact) / 256, "hadamard16", j);
    }
}

using Bytes = std::vector<u8>;

std::vector<const char*> isas() {
    std::vector<const char*> names = {"scalar"};
    for (const char* name : {"neon", "avx2", "avx512", "avx512bf16"}) {
        if (set_isa(name)) names.push_back(name);
    }
    return names;
}

Bytes values(int dtype, i64 count, std::mt19937& random, bool wild) {
    const int width = dtype == 0 ? 4 : 2;
    Bytes data(static_cast<size_t>(count * width));
    for (i64 i = 0; i < count; ++i) {
        u32 b = static_cast<u32>(random());
        if (dtype == 0 && !wild) b = (b & 0x80FFFFFFu) | 0x3C000000u;
        if (dtype == 0 && wild && (b & 0x7F800000u) == 0x7F800000u) b = 0;
        if (dtype == 1) b = wild && (b & 0x7C00u) != 0x7C00u ? b : (b & 0x83FFu) | 0x3000u;
        if (dtype == 2) b = wild && (b & 0x7F80u) != 0x7F80u ? b : (b & 0x80FFu) | 0x3C00u;
        std::memcpy(&data[static_cast<size_t>(i * width)], &b, static_cast<size_t>(width));
    }
    return data;
}

struct Result {
    Bytes codes, scales;
    float global = 0;
    bool operator==(const Result& o) const {
        return codes == o.codes && scales == o.scales && !std::memcmp(&global, &o.global, 4);
    }
};

QuantizeForm prepare(QuantizeForm f, i64 rows, i64 length, Result& r) {
    if (f.block == Block::none) return f;
    const bool mx = f.block == Block::b1x32;
    const i64 blocks = (length + (mx ? 31 : 15)) / (mx ? 32 : 16);
    r.codes.assign(static_cast<size_t>(rows * blocks * (mx ? 32 : 8)), 0xA5);
    r.scales.assign(static_cast<size_t>(rows * blocks), 0xA5);
    f.codes = r.codes.data();
    f.scales = r.scales.data();
    f.global_scale = &r.global;
    return f;
}

void quantize_everywhere() {
    const QuantizeForm none{Block::none, false, FourOverSix::off, -1, nullptr, nullptr, nullptr, 9, 3};
    std::vector<QuantizeForm> forms(8, none);
    forms[1].block = forms[3].block = forms[4].block = forms[6].block = Block::b1x16;
    forms[2].block = forms[5].block = Block::b16x16;
    forms[7].block = Block::b1x32;
    forms[3].hadamard = forms[6].hadamard = 0xD7E8;
    forms[3].stochastic = forms[5].stochastic = true;
    forms[4].four_over_six = FourOverSix::mae;
    forms[5].four_over_six = FourOverSix::mse;
    std::mt19937 random(2);
    const i64 shapes[][2] = {{1, 1}, {0, 5}, {3, 0}, {1, 160}, {17, 33}, {130, 47}, {33, 144}, {16, 16}};
    for (const auto& shape : shapes) {
        for (int dtype = 0; dtype < 3; ++dtype) {
            for (int order = 0; order < 3; ++order) {  // row-major, column-major, every second value of every third row
                const i64 rows = shape[0], cols = shape[1];
                const i64 rs = order == 0 ? cols : order == 1 ? 1 : 3 * 2 * cols, cs = order == 0 ? 1 : order == 1 ? rows : 2;
                const i64 reach = rows && cols ? (rows - 1) * rs + (cols - 1) * cs + 1 : 0;
                const Bytes x = values(dtype, reach, random, true);
                for (size_t i = 0; i < forms.size(); ++i) {
                    const QuantizeForm& a = forms[i];
                    const QuantizeForm& b = forms[(i * 3 + 1) % forms.size()];
                    Result row, col;
                    QuantizeParams p{x.data(), dtype, rows, cols, rs, cs, prepare(a, rows, cols, row), prepare(b, cols, rows, col), 1};
                    expect(scalar::quantize(p) == 0, "quantize status");
                    p.threads = 3;
                    for (const char* name : isas()) {
                        Result row_again, col_again;
                        p.row = prepare(a, rows, cols, row_again);
                        p.col = prepare(b, cols, rows, col_again);
                        set_isa(name);
                        expect(NVFP4_CALL(quantize, p) == 0, "quantize status");
                        expect(row_again == row && col_again == col, name, rows, cols, static_cast<i64>(i));
                    }
                }
            }
        }
    }
}

void hadamard_and_dequantize_everywhere() {
    std::mt19937 random(3);
    const i64 shapes[][2] = {{1, 1}, {0, 5}, {5, 33}, {19, 64}};
    for (const auto& shape : shapes) {
        const i64 rows = shape[0], cols = shape[1], padded = (cols + 15) / 16 * 16, padded32 = (cols + 31) / 32 * 32;
        const Bytes x = values(2, rows * cols, random, true);
        std::vector<u16> first;
        for (const char* name : isas()) {
            set_isa(name);
            std::vector<u16> y(static_cast<size_t>(rows * padded));
            const HadamardParams p{x.data(), 2, rows, cols, cols, 1, 0x1234, y.data(), 2};
            expect(NVFP4_CALL(hadamard, p) == 0, "hadamard status");
            if (first.empty()) first = y;
            expect(first == y, name, rows, cols);
        }
        Bytes codes(static_cast<size_t>(rows * padded32)), scales(static_cast<size_t>(rows * padded / 16));
        for (auto& c : codes) c = static_cast<u8>(random());
        for (auto& s : scales) s = static_cast<u8>(random());
        const float g = 0.37f;
        for (int dtype = 0; dtype < 3; ++dtype) {
            for (const float* global : {&g, static_cast<const float*>(nullptr)}) {
                Bytes expected;
                for (const char* name : isas()) {
                    set_isa(name);
                    Bytes y(static_cast<size_t>(rows * cols * (dtype ? 2 : 4)));
                    const DequantizeParams p{codes.data(), scales.data(), global, y.data(), dtype, rows, cols, 2};
                    expect(NVFP4_CALL(dequantize, p) == 0, "dequantize status");
                    if (expected.empty()) expected = y;
                    // NaN payloads may differ; numbers may not
                    for (size_t i = 0; dtype == 0 && i + 3 < y.size(); i += 4) {
                        float a, b;
                        std::memcpy(&a, &y[i], 4);
                        std::memcpy(&b, &expected[i], 4);
                        expect(a == b || (std::isnan(a) && std::isnan(b)), name, static_cast<i64>(i));
                    }
                }
            }
        }
    }
}

int run_matmul(const MatmulParams& p) { return NVFP4_CALL_BF16(matmul, p); }

void matmul_everywhere() {
    std::mt19937 random(4);
    const i64 shapes[][3] = {{1, 1, 1}, {0, 3, 16}, {3, 0, 16}, {2, 3, 0}, {7, 50, 100}, {9, 33, 272}, {40, 130, 48}, {33, 65, 700}};
    for (const auto& shape : shapes) {
        const i64 m = shape[0], n = shape[1], k = shape[2], k16 = (k + 15) / 16 * 16;
        Bytes a = values(2, m * k, random, false), a32 = values(0, m * k, random, false);
        Bytes codes(static_cast<size_t>(n * k16 / 2)), scales(static_cast<size_t>(n * k16 / 16));
        for (auto& c : codes) c = static_cast<u8>(random());
        for (auto& s : scales) s = static_cast<u8>(random() % 127);
        const float g = 0.01f;
        for (int wide = 0; wide < 2; ++wide) {
            const Operand left{wide ? Kind::fp32 : Kind::bf16, wide ? a32.data() : a.data(), nullptr, nullptr, m, k, k, 1};
            const Operand right{Kind::nvfp4, codes.data(), scales.data(), &g, n, k16, k16, 0};
            for (const char* name : isas()) {
                set_isa(name);
                std::vector<float> y(static_cast<size_t>(m * n)), again(y.size());
                MatmulParams p{left, right, nullptr, 0, y.data(), 0, false, false, 1};
                expect(run_matmul(p) == 0, "matmul status");
                p.out = again.data();
                p.threads = 3;
                run_matmul(p);
                expect(y == again, "matmul depends on the threads", m, n, k);
                for (i64 i = 0; i < m; ++i) {
                    for (i64 j = 0; j < n; ++j) {
                        double sum = 0, size = 0;
                        for (i64 q = 0; q < k; ++q) {
                            u16 h = 0;
                            float x;
                            if (wide) {
                                std::memcpy(&x, &a32[static_cast<size_t>((i * k + q) * 4)], 4);
                            } else {
                                std::memcpy(&h, &a[static_cast<size_t>((i * k + q) * 2)], 2);
                                x = from_bits(static_cast<u32>(h) << 16);
                            }
                            const u32 code = codes[static_cast<size_t>(j * k16 / 2 + q / 2)] >> (q % 2 * 4) & 15;
                            const double w = (code < 8 ? grid[code] : -grid[code - 8]) *
                                             e4m3_decode<F32x1>(U32x1(scales[static_cast<size_t>(j * k16 / 16 + q / 16)])).v;
                            sum += x * w;
                            size += std::fabs(x * w);
                        }
                        expect(std::fabs(y[static_cast<size_t>(i * n + j)] - sum * g) <= 2e-6 * size * g + 1e-30, name, m, n, k);
                    }
                }
            }
        }
    }
}

float value_at(const Bytes& data, int dtype, i64 i) {
    if (dtype == 0) {
        float x;
        std::memcpy(&x, &data[static_cast<size_t>(i * 4)], 4);
        return x;
    }
    u16 h;
    std::memcpy(&h, &data[static_cast<size_t>(i * 2)], 2);
    if (dtype == 2) return from_bits(static_cast<u32>(h) << 16);
    const int exponent = h >> 10 & 31, mantissa = h & 0x3FF;
    return static_cast<float>(std::ldexp(exponent ? mantissa + 1024 : mantissa, (exponent ? exponent : 1) - 25) * (h >> 15 ? -1 : 1));
}

// Two sequences of one row, `length` and 2 tokens: values against the recurrence in double, gradients against the scalar ones.
void selective_scan_everywhere() {
    std::mt19937 random(5);
    const i64 shapes[][6] = {{0, 1, 1, 1, 1, 1},  {1, 2, 1, 3, 5, 4},   {37, 6, 2, 20, 12, 16},
                             {70, 5, 1, 80, 33, 64}, {33, 2, 2, 17, 40, 9}, {9, 1, 1, 256, 3, 1}};
    for (const auto& shape : shapes) {
        const i64 length = shape[0] + 2, heads = shape[1], groups = shape[2], p = shape[3], n = shape[4];
        for (int dtype = 0; dtype < 3; ++dtype) {
            const i64 gap = 3, x_stride = heads * p + gap, b_stride = groups * n + gap, dt_stride = heads + gap;
            const auto reach = [&](i64 stride) { return (length - 1) * stride + stride - gap; };
            const Bytes x = values(dtype, reach(x_stride), random, false), B = values(dtype, reach(b_stride), random, false);
            const Bytes C = values(dtype, reach(b_stride), random, false), dt = values(dtype, reach(dt_stride), random, false);
            const Bytes dy = values(dtype, reach(x_stride), random, false);
            const i64 states = 2 * heads * p * n;
            std::vector<float> A(static_cast<size_t>(heads)), D(static_cast<size_t>(heads * p)), first(static_cast<size_t>(states));
            for (auto& a : A) a = -static_cast<float>(random() % 1000) / 100;
            for (auto& d : D) d = static_cast<float>(random() % 1000) / 500 - 1;
            for (auto& v : first) v = static_cast<float>(random() % 1000) / 500 - 1;
            const ScanSequence sequences[2] = {{0, 2, shape[0], 1}, {0, 0, 2, 0}};
            ScanParams scan{{x.data(), dtype, 0, x_stride, p}, {dt.data(), dtype, 0, dt_stride, 1},
                            {B.data(), dtype, 0, b_stride, n}, {C.data(), dtype, 0, b_stride, n}, A.data(), D.data(), A.data(),
                            first.data(), sequences, 2, 1, length, heads, groups, p, n, true, 0.0f, 10.0f, shape[5], nullptr, nullptr, 3};
            std::vector<double> exact(static_cast<size_t>(length * heads * p)), last(first.begin(), first.end());
            for (const ScanSequence& s : sequences) {
                for (i64 h = 0; h < heads; ++h) {
                    double* state = &last[static_cast<size_t>((s.index * heads + h) * p * n)];
                    for (i64 t = s.start; t < s.start + s.length; ++t) {
                        const double a = A[static_cast<size_t>(h)], raw = value_at(dt, dtype, t * dt_stride + h) + a;
                        const double step = std::fmin(std::log1p(std::exp(raw)), 10.0);
                        for (i64 i = 0; i < p; ++i) {
                            const double in = value_at(x, dtype, t * x_stride + h * p + i);
                            double y = D[static_cast<size_t>(h * p + i)] * in;
                            for (i64 j = 0; j < n; ++j) {
                                const i64 at = t * b_stride + h / (heads / groups) * n + j;
                                double& v = state[i * n + j];
                                v = std::exp(a * step) * v + step * in * value_at(B, dtype, at);
                                y += v * value_at(C, dtype, at);
                            }
                            exact[static_cast<size_t>((t * heads + h) * p + i)] = y;
                        }
                    }
                }
            }
            std::vector<float> expected;
            for (const char* name : isas()) {
                set_isa(name);
                const i64 width = dtype == 0 ? 4 : 2;
                Bytes y(static_cast<size_t>(length * heads * p * width)), dx(y.size()), ddt(static_cast<size_t>(length * heads * width));
                Bytes dB(static_cast<size_t>(length * groups * n * width)), dC(dB.size());
                std::vector<float> end(first.size()), dA(A.size()), dD(D.size()), dbias(A.size()), dfirst(first.size());
                scan.y = y.data();
                scan.last = end.data();
                expect(NVFP4_CALL_BF16(selective_scan, scan) == 0, "selective_scan status");
                const double tolerance = dtype == 0 ? 1e-5 : dtype == 1 ? 1e-3 : 1e-2;
                double error = 0, size = 0;
                for (size_t i = 0; i < exact.size(); ++i) {
                    const double off = value_at(y, dtype, static_cast<i64>(i)) - exact[i];
                    error += off * off;
                    size += exact[i] * exact[i];
                }
                for (size_t i = 0; i < last.size(); ++i) {
                    error += (end[i] - last[i]) * (end[i] - last[i]);
                    size += last[i] * last[i];
                }
                expect(error <= tolerance * tolerance * size, name, shape[0], heads, dtype);
                const ScanBackwardParams back{scan, {dy.data(), dtype, 0, x_stride, p}, first.data(), dx.data(), ddt.data(),
                                              dB.data(), dC.data(), dA.data(), dD.data(), dbias.data(), dfirst.data()};
                expect(NVFP4_CALL_BF16(selective_scan_backward, back) == 0, "selective_scan_backward status");
                std::vector<float> got;
                for (const auto* narrow : {&dx, &ddt, &dB, &dC}) {
                    for (i64 i = 0; i < static_cast<i64>(narrow->size()) / width; ++i) got.push_back(value_at(*narrow, dtype, i));
                }
                for (const auto* wide : {&dA, &dD, &dbias, &dfirst}) got.insert(got.end(), wide->begin(), wide->end());
                if (expected.empty()) expected = got;
                error = size = 0;
                for (size_t i = 0; i < got.size(); ++i) {
                    error += (got[i] - expected[i]) * (got[i] - expected[i]);
                    size += expected[i] * expected[i];
                }
                expect(error <= tolerance * tolerance * size, name, shape[0], heads, dtype + 10);
            }
        }
    }
}

Bytes values_of(const std::vector<double>& from, int dtype) {
    Bytes made(from.size() * (dtype == 0 ? 4 : 2));
    for (size_t i = 0; i < from.size(); ++i) {  // the values are exact in each dtype: multiples of 2^-5 below 4
        const float x = static_cast<float>(from[i]);
        u32 b = 0;
        std::memcpy(&b, &x, 4);
        if (dtype == 2) b >>= 16;
        if (dtype == 1) b = (b >> 16 & 0x8000) | (x == 0 ? 0 : ((b & 0x7FFFFFFF) - 0x38000000) >> 13);
        std::memcpy(&made[i * (dtype == 0 ? 4 : 2)], &b, dtype == 0 ? 4 : 2);
    }
    return made;
}

// Values and states against the recurrence in double; row 1 has no slot, row 0 the last; one thread and three the same bytes.
void state_update_everywhere() {
    std::mt19937 random(6);
    const auto some = [&](i64 count) {
        std::vector<double> made(static_cast<size_t>(count));
        for (auto& v : made) v = (static_cast<int>(random() % 255) - 127) / 32.0;
        return made;
    };
    const i64 shapes[][6] = {{2, 1, 1, 1, 1, 1}, {2, 3, 4, 2, 7, 17}, {2, 2, 3, 3, 80, 128}, {3, 0, 2, 1, 4, 16}, {2, 1, 3, 1, 5, 33}};
    for (const auto& shape : shapes) {
        const i64 batch = shape[0], tokens = shape[1], heads = shape[2], groups = shape[3], m = shape[4], n = shape[5];
        const i64 slots = batch + 1, each = heads * m * n;
        for (int form = 0; form < 18; ++form) {
            const int kept = form % 3, dtype = form / 3 % 3;
            const bool between = form >= 9;  // the states of each token apart; else rounded stochastically, where they are narrow
            const auto dx = some(batch * tokens * heads * m), ddt = some(batch * tokens * heads), dB = some(batch * tokens * groups * n);
            const auto dC = some(batch * tokens * groups * n), dstate = some(slots * each), dA = some(heads), dD = some(heads);
            const Bytes x = values_of(dx, dtype), dt = values_of(ddt, dtype), B = values_of(dB, dtype), C = values_of(dC, dtype);
            std::vector<float> A, D;
            for (double a : dA) A.push_back(static_cast<float>(-std::fabs(a)));
            for (double d : dD) D.push_back(static_cast<float>(d));
            std::vector<i64> indices(static_cast<size_t>(batch), 0);
            indices[0] = slots - 1, indices[1] = -1;
            std::vector<double> exact(static_cast<size_t>(batch * tokens * heads * m)), states = dstate;
            for (i64 b = 0; b < batch; ++b) {
                for (i64 t = 0; t < tokens; ++t) {
                    for (i64 h = 0; h < heads && b != 1; ++h) {
                        const double raw = ddt[static_cast<size_t>((b * tokens + t) * heads + h)] + A[static_cast<size_t>(h)];
                        const double step = std::fmin(std::log1p(std::exp(raw)), 2.0);
                        for (i64 i = 0; i < m; ++i) {
                            const i64 at = ((b * tokens + t) * heads + h) * m + i;
                            const double in = dx[static_cast<size_t>(at)];
                            double y = D[static_cast<size_t>(h)] * in;
                            for (i64 j = 0; j < n; ++j) {
                                const size_t g = static_cast<size_t>(((b * tokens + t) * groups + h / (heads / groups)) * n + j);
                                double& v = states[static_cast<size_t>(indices[static_cast<size_t>(b)] * each + (h * m + i) * n + j)];
                                v = std::exp(A[static_cast<size_t>(h)] * step) * v + step * in * dB[g];
                                y += v * dC[g];
                            }
                            exact[static_cast<size_t>(at)] = y / (1 + std::exp(-in)) * in;
                        }
                    }
                }
            }
            for (const char* name : isas()) {
                set_isa(name);
                Bytes expected;
                for (int threads : {1, 3}) {
                    const size_t width = kept == 0 ? 4 : 2;
                    Bytes all = values_of(dstate, kept), made(static_cast<size_t>(between ? batch * tokens * each : 0) * width);
                    Bytes y(static_cast<size_t>(batch * tokens * heads * m * (dtype == 0 ? 4 : 2)));
                    const ScanView given{x.data(), dtype, tokens * heads * m, heads * m, m};
                    const ScanView wide_B{B.data(), dtype, tokens * groups * n, groups * n, n};
                    const ScanView wide_C{C.data(), dtype, tokens * groups * n, groups * n, n};
                    const StateUpdateParams p{batch, tokens, heads, groups, m, n, slots, kept,
                                              {all.data(), each, 0, m * n, n},
                                              {between ? made.data() : nullptr, tokens * each, each, m * n, n},
                                              given, {dt.data(), dtype, tokens * heads, heads, 1}, wide_B, wide_C, given,
                                              A.data(), D.data(), false, A.data(), indices.data(), true, 0.0f, 2.0f,
                                              kept != 0 && !between, 7, 9, y.data(), threads};
                    expect(NVFP4_CALL(state_update, p) == 0, "state_update status");
                    if (expected.empty()) expected = y;
                    expect(y == expected, "state_update depends on the threads", m, n, form);
                    const double tolerance = kept == 2 || dtype == 2 ? 1e-2 : kept == 1 || dtype == 1 ? 2e-3 : 1e-5;
                    double error = 0, size = 0;
                    for (size_t i = 0; i < exact.size(); ++i) {
                        const double off = value_at(y, dtype, static_cast<i64>(i)) - exact[i];
                        error += off * off;
                        size += exact[i] * exact[i];
                    }
                    for (i64 i = 0; i < slots * each; ++i) {
                        const double wanted = between ? dstate[static_cast<size_t>(i)] : states[static_cast<size_t>(i)];
                        const double off = value_at(all, kept, i) - wanted;
                        error += off * off;
                        size += wanted * wanted;
                    }
                    expect(error <= tolerance * tolerance * size, name, m, n, form);
                }
                indices[0] = slots;
                const StateUpdateParams wrong{batch, tokens, heads, groups, m, n, slots, 0, {}, {}, {}, {}, {}, {}, {}, nullptr, nullptr,
                                              false, nullptr, indices.data(), true, 0.0f, 2.0f, false, 0, 0, nullptr, 1};
                expect(NVFP4_CALL(state_update, wrong) == 2, "state_update takes a slot that is none");
                indices[0] = slots - 1;
            }
        }
    }
}

void exp_everywhere() {
    for (const char* name : isas()) {
        set_isa(name);
        const ExpErrors worst = NVFP4_CALL(exp_errors, 1021);
        expect(worst.exp < 1, "exp", static_cast<i64>(worst.exp * 1000));
        expect(worst.softplus < 3, "softplus", static_cast<i64>(worst.softplus * 1000));
        expect(worst.sigmoid < 2.5 && worst.silu < 2.5, "silu", static_cast<i64>(worst.silu * 1000));
        expect(worst.faded < 2e-36, "silu of very negative values", static_cast<i64>(worst.faded * 1e39));
    }
}

}  // namespace

int main() {
    definitions();
    exp_everywhere();
    norm_and_convolution();
    experts_everywhere();
    quantize_everywhere();
    hadamard_and_dequantize_everywhere();
    matmul_everywhere();
    selective_scan_everywhere();
    state_update_everywhere();
    std::printf("%s: %d failures; instruction sets:", failures ? "FAILED" : "passed", failures);
    for (const char* name : isas()) std::printf(" %s", name);
    std::printf("\n");
    return failures ? 1 : 0;
}

// gated_rms_norm and causal_conv1d without Python: on each instruction set against sums in double, in buffers of exactly the
// promised size; three threads give the bytes that one gives.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "causal_conv1d/params.h"
#include "checks.h"
#include "gated_rms_norm/params.h"

namespace nvfp4 {
namespace {

using Doubles = std::vector<double>;
using Bytes = std::vector<u8>;

std::mt19937 random_bits(7);

size_t size_of(i64 count) { return static_cast<size_t>(count); }
int width_of(int dtype) { return dtype ? 2 : 4; }

// Multiples of 1/16 below 2, which each dtype holds.
Doubles numbers(i64 count) {
    Doubles made(size_of(count));
    for (auto& v : made) v = (static_cast<int>(random_bits() % 63) - 31) / 16.0;
    return made;
}

// The numbers of [rows, cols] in rows `stride` apart; what lies between is NaN.
Bytes spread(const Doubles& from, i64 cols, i64 stride, int dtype) {
    const i64 rows = static_cast<i64>(from.size()) / cols;
    const size_t width = size_of(width_of(dtype));
    Bytes made(rows ? size_of((rows - 1) * stride + cols) * width : width, 0xFF);
    for (i64 i = 0; i < rows * cols; ++i) {
        const float x = static_cast<float>(from[size_of(i)]);
        u32 b;
        std::memcpy(&b, &x, 4);
        if (dtype == 2) b >>= 16;
        if (dtype == 1) b = (b >> 16 & 0x8000) | (x == 0 ? 0 : ((b & 0x7FFFFFFF) - 0x38000000) >> 13);
        std::memcpy(&made[size_of(i / cols * stride + i % cols) * width], &b, width);
    }
    return made;
}
Bytes packed(const Doubles& from, int dtype) { return spread(from, 1, 1, dtype); }
Bytes room(i64 count, int dtype) { return Bytes(size_of(count * width_of(dtype)), 0xFF); }
std::vector<float> floats(const Doubles& from) { return {from.begin(), from.end()}; }
Bytes bytes(const std::vector<float>& from) {
    Bytes made(from.size() * 4);
    if (!from.empty()) std::memcpy(made.data(), from.data(), made.size());
    return made;
}

double value(const Bytes& data, int dtype, size_t i) {
    u32 b = 0;
    std::memcpy(&b, &data[i * size_of(width_of(dtype))], size_of(width_of(dtype)));
    if (dtype == 1) {
        const int exponent = b >> 10 & 31, mantissa = b & 0x3FF;
        return std::ldexp(exponent ? mantissa + 1024 : mantissa, (exponent ? exponent : 1) - 25) * (b >> 15 ? -1 : 1);
    }
    if (dtype == 2) b <<= 16;
    float x;
    std::memcpy(&x, &b, 4);
    return x;
}

// Whether the difference is at most a rounding of the dtype, in the norm, of numbers that are about 1: derivatives alone may
// be what a cancellation left over. A NaN is not.
bool near(const Bytes& got, int dtype, const Doubles& exact) {
    double error = 0, size = 0.1 * static_cast<double>(exact.size());
    for (size_t i = 0; i < exact.size(); ++i) {
        const double off = value(got, dtype, i) - exact[i];
        error += off * off;
        size += exact[i] * exact[i];
    }
    const double tolerance = dtype == 0 ? 4e-6 : dtype == 1 ? 5e-4 : 4e-3;
    return error <= tolerance * tolerance * size;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double slope(double x) { return sigmoid(x) * (1 + x * (1 - sigmoid(x))); }  // of x sigmoid(x)

template <class Run>
void everywhere(const Run& run) {
    for (const char* name : {"scalar", "avx2", "avx512"}) {
        if (set_isa(name)) run();
    }
}

void norm(i64 rows, i64 channels, i64 group, Gate gate, int dtype) {
    const i64 x_stride = channels + 3, z_stride = channels + 5, dy_stride = channels + 1, count = rows * channels;
    const Doubles x = numbers(count), z = numbers(count), dy = numbers(count), w = numbers(channels);
    Doubles y(size_of(count)), dx(y), dz(y), dw(size_of(channels));
    for (i64 first = 0; first < count; first += group) {
        double squares = 0, dot = 0;
        const auto each = [&](auto f) {
            for (i64 i = first; i < first + group; ++i) {
                const size_t at = size_of(i), c = size_of(i % channels);
                const double open = gate == Gate::none ? 1 : z[at] * sigmoid(z[at]);
                f(at, c, open, gate == Gate::before_norm ? x[at] * open : x[at], gate == Gate::after_norm ? dy[at] * open : dy[at]);
            }
        };
        each([&](size_t, size_t c, double, double u, double d) { squares += u * u, dot += u * d * w[c]; });
        const double rms = std::sqrt(squares / static_cast<double>(group) + 0.125), mean = dot / static_cast<double>(group);
        each([&](size_t at, size_t c, double open, double u, double d) {
            const double du = (d * w[c] - u * mean / (rms * rms)) / rms, n = u / rms;
            y[at] = n * w[c] * (gate == Gate::after_norm ? open : 1);
            dw[c] += d * n;
            dx[at] = gate == Gate::before_norm ? du * open : du;
            dz[at] = (gate == Gate::before_norm ? du * x[at] : dy[at] * n * w[c]) * slope(z[at]);
        });
    }
    const Bytes given_x = spread(x, channels, x_stride, dtype), given_z = spread(z, channels, z_stride, dtype);
    const Bytes given_dy = spread(dy, channels, dy_stride, dtype);
    const std::vector<float> weight = floats(w);
    everywhere([&] {
        Bytes first[3];
        for (int threads : {1, 3}) {
            Bytes made[3] = {room(count, dtype), room(count, dtype), room(count, dtype)};
            std::vector<float> dweight(weight.size());
            GatedRmsNormParams p{};
            p.dtype = dtype, p.rows = rows, p.channels = channels, p.group = group, p.gate = gate, p.eps = 0.125f;
            p.x = given_x.data(), p.z = gate == Gate::none ? nullptr : given_z.data();
            p.x_stride = x_stride, p.z_stride = z_stride, p.weight = weight.data(), p.y = made[0].data();
            p.dy = given_dy.data(), p.dy_stride = dy_stride, p.dx = made[1].data(), p.dz = p.z ? made[2].data() : nullptr;
            p.dweight = dweight.data(), p.threads = threads;
            const int status = NVFP4_CALL(gated_rms_norm, p) + NVFP4_CALL(gated_rms_norm_backward, p);
            expect(status == 0, "gated_rms_norm status", rows, channels, group);
            const Bytes all[3] = {made[0], made[1], bytes(dweight)};
            expect(near(made[0], dtype, y), "gated_rms_norm", rows, channels, group);
            expect(near(made[1], dtype, dx), "gated_rms_norm: dx", rows, channels, group);
            expect(near(all[2], 0, dw), "gated_rms_norm: dweight", rows, channels, group);
            expect(!p.z || near(made[2], dtype, dz), "gated_rms_norm: dz", rows, channels, group);
            for (int i = 0; i < 3; ++i) {
                if (threads == 1) first[i] = all[i];
                expect(first[i] == all[i], "gated_rms_norm depends on the threads", rows, channels, group);
            }
        }
    });
}

// Sequences from bounds[s] to bounds[s + 1]; `equal`: all of one length, in rows of their own. `full`: with all there can be.
void convolution(const std::vector<i64>& bounds, i64 channels, int width, int dtype, bool equal, bool full) {
    const i64 sequences = static_cast<i64>(bounds.size()) - 1, tokens = bounds.back(), history = width - 1;
    const i64 states = sequences * channels * history, stride = channels + 3;
    const auto some = [&](i64 count) { return full ? numbers(count) : Doubles(size_of(count)); };
    const Doubles x = numbers(tokens * channels), dy = numbers(tokens * channels), taps = numbers(width * channels);
    const Doubles bias = some(channels), before = some(states), after = some(states);
    Doubles y(x.size()), dx(x.size()), dtaps(size_of((width + 1) * channels)), last(before.size()), dbefore(before.size());
    for (i64 s = 0; s < sequences; ++s) {
        for (i64 c = 0; c < channels; ++c) {
            const i64 length = bounds[size_of(s + 1)] - bounds[size_of(s)];
            const auto state = [&](i64 k) { return size_of((s * channels + c) * history + k); };
            const auto token = [&](i64 t) { return size_of((bounds[size_of(s)] + t) * channels + c); };
            Doubles inputs, gradients(size_of(history + length));
            for (i64 k = 0; k < history; ++k) inputs.push_back(before[state(k)]);
            for (i64 t = 0; t < length; ++t) inputs.push_back(x[token(t)]);
            for (i64 t = 0; t < length; ++t) {
                double pre = bias[size_of(c)];
                for (i64 k = 0; k < width; ++k) pre += taps[size_of(k * channels + c)] * inputs[size_of(t + k)];
                y[token(t)] = full ? pre * sigmoid(pre) : pre;
                const double d = dy[token(t)] * (full ? slope(pre) : 1);
                for (i64 k = 0; k < width; ++k) {
                    dtaps[size_of(k * channels + c)] += d * inputs[size_of(t + k)];
                    gradients[size_of(t + k)] += d * taps[size_of(k * channels + c)];
                }
                dtaps[size_of(width * channels + c)] += d;
            }
            for (i64 k = 0; k < history; ++k) {
                last[state(k)] = inputs[size_of(length + k)];
                gradients[size_of(length + k)] += after[state(k)];
            }
            for (i64 k = 0; k < history; ++k) dbefore[state(k)] = gradients[size_of(k)];
            for (i64 t = 0; t < length; ++t) dx[token(t)] = gradients[size_of(history + t)];
        }
    }
    const Bytes given_x = spread(x, channels, stride, dtype), given_dy = spread(dy, channels, stride, dtype);
    const Bytes initial = packed(before, dtype), dstate = packed(after, dtype);
    const std::vector<float> wide_taps = floats(taps), wide_bias = floats(bias);
    everywhere([&] {
        Bytes first[3];
        for (int threads : {1, 3}) {
            const i64 outputs = tokens ? tokens * channels : 1;
            Bytes made[3] = {room(outputs, dtype), room(states, dtype), room(outputs, dtype)};
            std::vector<float> wide_dtaps(dtaps.size()), dinitial(before.size());
            CausalConv1dParams p{};
            p.dtype = p.initial_dtype = dtype, p.tokens = tokens, p.channels = channels, p.sequences = sequences;
            p.width = width, p.silu = full, p.starts = equal ? nullptr : bounds.data();
            p.x = given_x.data(), p.dy = given_dy.data(), p.x_token = p.dy_token = stride;
            p.x_row = p.dy_row = equal ? tokens / sequences * stride : 0;
            p.taps = wide_taps.data(), p.bias = full ? wide_bias.data() : nullptr;
            p.initial = full ? initial.data() : nullptr, p.dstate = full ? dstate.data() : nullptr;
            p.y = made[0].data(), p.state = made[1].data(), p.dx = made[2].data(), p.dtaps = wide_dtaps.data();
            p.dinitial = full ? dinitial.data() : nullptr, p.threads = threads;
            const int status = NVFP4_CALL(causal_conv1d, p) + NVFP4_CALL(causal_conv1d_backward, p);
            expect(status == 0, "causal_conv1d status", tokens, channels, width);
            const Bytes all[3] = {made[0], made[2], bytes(wide_dtaps)};
            expect(near(made[0], dtype, y), "causal_conv1d", tokens, channels, width);
            expect(near(made[1], dtype, last), "causal_conv1d: state", tokens, channels, width);
            expect(near(made[2], dtype, dx), "causal_conv1d: dx", tokens, channels, width);
            expect(near(all[2], 0, dtaps), "causal_conv1d: dtaps", tokens, channels, width);
            expect(!full || near(bytes(dinitial), 0, dbefore), "causal_conv1d: dinitial", tokens, channels, width);
            for (int i = 0; i < 3; ++i) {
                if (threads == 1) first[i] = all[i];
                expect(first[i] == all[i], "causal_conv1d depends on the threads", tokens, channels, width);
            }
        }
    });
    std::vector<i64> wrong = bounds;
    wrong.back() += 1;
    CausalConv1dParams p{};
    p.tokens = tokens, p.channels = channels, p.sequences = sequences, p.width = width, p.starts = wrong.data(), p.threads = 1;
    const bool refused = NVFP4_CALL(causal_conv1d, p) == 2 && NVFP4_CALL(causal_conv1d_backward, p) == 2;
    expect(refused, "causal_conv1d takes wrong bounds", tokens, channels, width);
}

}  // namespace

void norm_and_convolution() {
    for (int dtype = 0; dtype < 3; ++dtype) {
        for (Gate gate : {Gate::none, Gate::before_norm, Gate::after_norm}) {
            norm(1, 1, 1, gate, dtype);
            norm(0, 7, 7, gate, dtype);
            norm(5, 33, 33, gate, dtype);
            norm(70, 80, 16, gate, dtype);
            norm(1030, 12, 4, gate, dtype);  // blocks of 17 rows in the sums of dweight
        }
        for (int width = 2; width <= 4; ++width) {
            for (bool full : {true, false}) {
                convolution({0, 1}, 1, width, dtype, true, full);
                convolution({0, 70, 140}, 17, width, dtype, true, full);  // walks are 64 tokens long
                convolution({0, 0, 2, 2, 131, 132, 132}, 37, width, dtype, false, full);
                convolution({0, 0, 0}, 5, width, dtype, false, full);
            }
        }
    }
}

}  // namespace nvfp4

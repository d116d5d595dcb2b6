// gated_rms_norm on the CPU. A group is walked twice, the second time out of the first-level cache: sums, then results.
// Moved: x, z and y once (backward: x, z, dy, dx, dz), and the sums of dweight. z is mostly a piece of each row of a wide
// matrix, where no hardware prefetcher finds the next piece: the walks fetch it a row ahead, which saves a fifth of the time.
#include "params.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/exp.h"
#include "cpu/runs.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

float inverse_rms(float squares, const GatedRmsNormParams& p) {
    return 1.0f / std::sqrt(squares / static_cast<float>(p.group) + p.eps);
}

// One group. `kept` [group] holds u of the first walk, where u costs an exponential.
template <class T, Gate gate>
void norm_group(const GatedRmsNormParams& p, const T* x, const T* z, const float* weight, T* y, float* kept) {
    F squares[sums] = {F(0.0f), F(0.0f), F(0.0f), F(0.0f)};
    over(p.group, [&](i64 i, int k, auto extent) {
        F u = load(x + i, extent);
        if (gate == Gate::before_norm) {
            __builtin_prefetch(z + i + p.z_stride);
            u = u * silu(load(z + i, extent));
            store(kept + i, u, extent);
        }
        squares[k] = fma(u, u, squares[k]);
    });
    const F rstd = inverse_rms(total(squares), p);
    over(p.group, [&](i64 i, int, auto extent) {
        const F u = gate == Gate::before_norm ? load(kept + i, extent) : load(x + i, extent);
        F v = u * rstd * load(weight + i, extent);
        if (gate == Gate::after_norm) v = v * silu(load(z + i, extent));
        store(y + i, v, extent);
    });
}

// With n = u / rms(u), dn = dy weight (times the gate, where it comes after): du = (dn - n <n, dn> / group) / rms(u).
// `kept` holds sigmoid(z); adds dy n to dweight.
template <class T, Gate gate>
void backward_group(const GatedRmsNormParams& p, const T* x, const T* z, const float* weight, const T* dy, T* dx, T* dz,
                    float* dweight, float* kept) {
    F squares[sums] = {F(0.0f), F(0.0f), F(0.0f), F(0.0f)}, dots[sums] = {F(0.0f), F(0.0f), F(0.0f), F(0.0f)};
    over(p.group, [&](i64 i, int k, auto extent) {
        F u = load(x + i, extent), dn = load(dy + i, extent) * load(weight + i, extent);
        if (gate != Gate::none) {
            __builtin_prefetch(z + i + p.z_stride);
            const F wide = load(z + i, extent), s = sigmoid(wide);
            store(kept + i, s, extent);
            (gate == Gate::before_norm ? u : dn) = (gate == Gate::before_norm ? u : dn) * (wide * s);
        }
        squares[k] = fma(u, u, squares[k]);
        dots[k] = fma(u, dn, dots[k]);
    });
    const float inverse = inverse_rms(total(squares), p);
    const F rstd = inverse, shared = inverse * inverse * (total(dots) / static_cast<float>(p.group));
    over(p.group, [&](i64 i, int, auto extent) {
        const F wide_x = load(x + i, extent), wide_dy = load(dy + i, extent), w = load(weight + i, extent);
        F open = F(1.0f), slope = F(0.0f);  // silu(z) and its derivative
        if (gate != Gate::none) {
            const F wide_z = load(z + i, extent), s = load(kept + i, extent);
            open = wide_z * s;
            slope = fma(open, F(1.0f) - s, s);
        }
        const F u = gate == Gate::before_norm ? wide_x * open : wide_x;
        const F dnormed = gate == Gate::after_norm ? wide_dy * open : wide_dy;
        const F du = (dnormed * w - u * shared) * rstd;
        store(dweight + i, fma(dnormed, u * rstd, load(dweight + i, extent)), extent);
        store(dx + i, gate == Gate::before_norm ? du * open : du, extent);
        if (gate != Gate::none) {
            store(dz + i, (gate == Gate::before_norm ? du * wide_x : wide_dy * w * (u * rstd)) * slope, extent);
        }
    });
}

template <class Function>
void with_gate(Gate gate, Function f) {
    switch (gate) {
        case Gate::none: return f(std::integral_constant<Gate, Gate::none>{});
        case Gate::before_norm: return f(std::integral_constant<Gate, Gate::before_norm>{});
        case Gate::after_norm: return f(std::integral_constant<Gate, Gate::after_norm>{});
    }
}

// f(type, gate) with the element type and the gate as types.
template <class Function>
void dispatch(const GatedRmsNormParams& p, Function f) {
    with_dtype(p.dtype, [&](auto* type) { with_gate(p.gate, [&](auto gate) { f(type, gate); }); });
}

int useful_threads(const GatedRmsNormParams& p) {
    const i64 most = p.rows * p.channels / 16384 + 1;
    return static_cast<int>(p.threads < most ? p.threads : most);
}

// `floats` floats that the calling thread keeps between calls; null when memory ran out.
float* buffer(i64 floats) {
    static thread_local Scratch scratch;
    return static_cast<float*>(scratch.get(floats * 4));
}

}  // namespace

int gated_rms_norm(const GatedRmsNormParams& p) {
    const int threads = useful_threads(p);
    float* const kept = buffer(threads * p.group);
    if (!kept) return 1;
    auto body = [&](int t, int n) {
        const Range rows = part(p.rows, 1, t, n);
        dispatch(p, [&](auto* type, auto gate) {
            using T = std::remove_pointer_t<decltype(type)>;
            const T *x = static_cast<const T*>(p.x), *z = static_cast<const T*>(p.z);
            T* y = static_cast<T*>(p.y);
            for (i64 r = rows.begin; r < rows.end; ++r) {
                for (i64 c = 0; c < p.channels; c += p.group) {
                    norm_group<T, gate.value>(p, x + r * p.x_stride + c, z ? z + r * p.z_stride + c : z, p.weight + c,
                                              y + r * p.channels + c, kept + t * p.group);
                }
            }
        });
    };
    parallel(threads, body);
    return 0;
}

// dweight: the rows fall into at most 64 blocks, whatever the threads; each block's sum is made in the order of its rows, then
// the blocks are added in order.
int gated_rms_norm_backward(const GatedRmsNormParams& p) {
    const int threads = useful_threads(p);
    const i64 block = p.rows <= 64 * 16 ? 16 : (p.rows + 63) / 64, blocks = (p.rows + block - 1) / block;
    float* const kept = buffer(threads * p.group + blocks * p.channels);
    if (!kept) return 1;
    float* const sums_of_blocks = kept + threads * p.group;
    auto body = [&](int t, int n) {
        const Range mine = part(blocks, 1, t, n);
        dispatch(p, [&](auto* type, auto gate) {
            using T = std::remove_pointer_t<decltype(type)>;
            const T *x = static_cast<const T*>(p.x), *z = static_cast<const T*>(p.z), *dy = static_cast<const T*>(p.dy);
            T *dx = static_cast<T*>(p.dx), *dz = static_cast<T*>(p.dz);
            for (i64 b = mine.begin; b < mine.end; ++b) {
                float* dweight = sums_of_blocks + b * p.channels;
                std::memset(dweight, 0, static_cast<size_t>(p.channels) * 4);
                for (i64 r = b * block; r < p.rows && r < (b + 1) * block; ++r) {
                    for (i64 c = 0; c < p.channels; c += p.group) {
                        const i64 out = r * p.channels + c;
                        backward_group<T, gate.value>(p, x + r * p.x_stride + c, z ? z + r * p.z_stride + c : z,
                                                      p.weight + c, dy + r * p.dy_stride + c, dx + out, dz ? dz + out : dz,
                                                      dweight + c, kept + t * p.group);
                    }
                }
            }
        });
    };
    parallel(threads, body);
    add_blocks(sums_of_blocks, blocks, p.channels, p.dweight);
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

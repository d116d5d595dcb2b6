// causal_conv1d on the CPU. A walk takes one vector of channels along the tokens of a piece of a sequence and keeps the last
// width - 1 inputs in registers; backward keeps as many gradients before the activation too. Pieces are short, so that the
// rows they touch stay in the caches and the TLB while the walks go over the channels. Moved: x and y once (backward: x, dy, dx).
// Several tokens go in step, which took 15% off: four forward, two backward, where four no longer fit in the registers.
#include "params.h"

#include <cstring>
#include <type_traits>

#include "cpu/exp.h"
#include "cpu/runs.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

constexpr i64 piece = 64;  // tokens

i64 start(const CausalConv1dParams& p, i64 sequence) {
    return p.starts ? p.starts[sequence] : sequence * (p.tokens / p.sequences);
}

bool sound(const CausalConv1dParams& p) {
    if (!p.starts) return true;
    for (i64 s = 0; s < p.sequences; ++s) {
        if (p.starts[s] > p.starts[s + 1]) return false;
    }
    return p.starts[0] == 0 && p.starts[p.sequences] == p.tokens;
}

// A part of a sequence: tokens first .. last - 1 of its `length`.
struct Piece {
    i64 sequence, first, last, length;
};

// f(Piece) for all of the tokens begin .. end - 1, and for the empty sequences that lie there; those at the very end lie in
// the range that ends there.
template <class Function>
void over_pieces(const CausalConv1dParams& p, i64 begin, i64 end, Function f) {
    i64 low = 0, high = p.sequences;  // low will be the first sequence that starts at `begin` or later
    while (low < high) {
        const i64 middle = (low + high) / 2;
        if (start(p, middle) < begin) low = middle + 1;
        else high = middle;
    }
    if (low > 0 && (low == p.sequences || start(p, low) > begin)) --low;
    for (i64 s = low; s < p.sequences; ++s) {
        const i64 at = start(p, s), stop = start(p, s + 1);
        if (at >= end && !(at == stop && end == p.tokens)) break;
        const i64 first = (at < begin ? begin : at) - at, last = (stop < end ? stop : end) - at;
        i64 t = first;
        do {  // once for an empty sequence
            const i64 next = t + piece < last ? t + piece : last;
            f(Piece{s, t, next, stop - at});
            t = next;
        } while (t < last);
    }
}

// f(type, width) with the element type and the width as types.
template <class Function>
void dispatch(const CausalConv1dParams& p, Function f) {
    with_dtype(p.dtype, [&](auto* type) {
        if (p.width == 2) f(type, std::integral_constant<int, 2>{});
        if (p.width == 3) f(type, std::integral_constant<int, 3>{});
        if (p.width == 4) f(type, std::integral_constant<int, 4>{});
    });
}

template <class Function>
void over_channels(const CausalConv1dParams& p, Function f) {
    i64 c = 0;
    for (; c + F::lanes <= p.channels; c += F::lanes) f(c, Whole{});
    if (c < p.channels) f(c, Part{static_cast<int>(p.channels - c)});
}

// `count` values of a tensor of any dtype, `stride` apart from element `at` on. States are read so, a few values a sequence:
// inlined, every walk over a sequence would be compiled with all dtypes of them.
__attribute__((noinline)) F read_spread(const void* from, int dtype, i64 at, i64 stride, int count) {
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T run[F::lanes] = {};
        for (int i = 0; i < count; ++i) run[i] = static_cast<const T*>(from)[at + i * stride];
        return load(run);
    });
}
__attribute__((noinline)) void write_spread(void* to, int dtype, i64 at, i64 stride, int count, F x) {
    with_dtype(dtype, [&](auto* type) {
        std::remove_pointer_t<decltype(type)> run[F::lanes];
        store(run, x);
        for (int i = 0; i < count; ++i) static_cast<decltype(type)>(to)[at + i * stride] = run[i];
    });
}

// What forward and backward have in common: the taps of a vector of channels, and the inputs of the last tokens.
template <class T, int width, class Extent>
struct Walk {
    static constexpr int history = width - 1;
    const CausalConv1dParams& p;
    const Piece& at;
    const i64 c;
    const Extent extent;
    const T* x;  // token 0 of the sequence
    F tap[width], bias, past[history];  // past: oldest first

    NVFP4_INLINE_MEMBER Walk(const CausalConv1dParams& params, const Piece& piece, i64 channel, Extent e)
        : p(params), at(piece), c(channel), extent(e), x(row(p.x, p.x_row, p.x_token)) {
        NVFP4_UNROLL
        for (int k = 0; k < width; ++k) tap[k] = load(p.taps + k * p.channels + c, extent);
        bias = p.bias ? load(p.bias + c, extent) : F(0.0f);
        NVFP4_UNROLL
        for (int k = 0; k < history; ++k) {
            const i64 t = at.first - history + k;
            past[k] = t >= 0        ? load(x + t * p.x_token, extent)
                      : !p.initial ? F(0.0f)
                                   : read_spread(p.initial, p.initial_dtype, entry(t + history), history, size(extent));
        }
    }

    // Token 0 of the sequence in a tensor with the strides of x or dy.
    NVFP4_INLINE_MEMBER const T* row(const void* data, i64 row_stride, i64 token_stride) const {
        return static_cast<const T*>(data) + (p.starts ? p.starts[at.sequence] * token_stride : at.sequence * row_stride) + c;
    }

    // Where entry k of a state lies for these channels.
    NVFP4_INLINE_MEMBER i64 entry(i64 k) const { return (at.sequence * p.channels + c) * history + k; }

    // inputs: those of the tokens t - history .. t + n - 1. The next read is of the tokens from t + n.
    template <int n>
    NVFP4_INLINE_MEMBER void read(i64 t, F* inputs) {
        NVFP4_UNROLL
        for (int k = 0; k < history; ++k) inputs[k] = past[k];
        NVFP4_UNROLL
        for (int i = 0; i < n; ++i) inputs[history + i] = fetch(x + (t + i) * p.x_token);
        NVFP4_UNROLL
        for (int k = 0; k < history; ++k) past[k] = inputs[n + k];
    }

    // The value before the activation, from the inputs of a token and of those before it.
    NVFP4_INLINE_MEMBER F convolve(const F* inputs) const {
        F sum = bias;
        NVFP4_UNROLL
        for (int k = 0; k < width; ++k) sum = fma(tap[k], inputs[k], sum);
        return sum;
    }

    // The walk over the next channels comes back for the other half of these cache lines, then for the next ones.
    NVFP4_INLINE_MEMBER F fetch(const T* from) const {
        __builtin_prefetch(from + 2 * F::lanes);
        return load(from, extent);
    }
    NVFP4_INLINE_MEMBER void put(T* to, F v) const {
        __builtin_prefetch(to + 2 * F::lanes, 1);
        store(to, v, extent);
    }
};

template <class T, int width, class Extent>
struct ForwardWalk : Walk<T, width, Extent> {
    using Base = Walk<T, width, Extent>;
    using Base::Base, Base::at, Base::history, Base::p;

    template <int n>
    NVFP4_INLINE_MEMBER void step(i64 t, T* y) {
        F inputs[history + n], pre[n];
        this->template read<n>(t, inputs);
        NVFP4_UNROLL
        for (int i = 0; i < n; ++i) pre[i] = this->convolve(inputs + i);
        if (p.silu) silu<n>(pre);
        NVFP4_UNROLL
        for (int i = 0; i < n; ++i) this->put(y + (t + i) * p.channels, pre[i]);
    }

    NVFP4_INLINE_MEMBER void run() {
        T* y = static_cast<T*>(p.y) + start(p, at.sequence) * p.channels + this->c;
        i64 t = at.first;
        for (; t + 4 <= at.last; t += 4) step<4>(t, y);
        for (; t < at.last; ++t) step<1>(t, y);
        if (at.last < at.length) return;
        NVFP4_UNROLL
        for (int k = 0; k < history; ++k) {
            write_spread(p.state, p.dtype, this->entry(k), history, size(this->extent), this->past[k]);
        }
    }
};

// dx[t] takes the gradients before the activation of the tokens t .. t + width - 1, so it is written width - 1 tokens later; at
// the end of a piece inside a sequence those of the next piece are formed as well.
template <class T, int width, class Extent>
struct BackwardWalk : Walk<T, width, Extent> {
    using Base = Walk<T, width, Extent>;
    using Base::at, Base::extent, Base::history, Base::p, Base::tap;
    const T* dy;
    T* dx;
    F dtap[width + 1], recent[history];  // of taps and bias; before the activation, of the last tokens, oldest first

    NVFP4_INLINE_MEMBER BackwardWalk(const CausalConv1dParams& params, const Piece& piece, i64 channel, Extent e)
        : Base(params, piece, channel, e), dy(this->row(p.dy, p.dy_row, p.dy_token)) {
        dx = static_cast<T*>(p.dx) + start(p, at.sequence) * p.channels + channel;
        NVFP4_UNROLL
        for (int k = 0; k <= width; ++k) dtap[k] = F(0.0f);
        NVFP4_UNROLL
        for (int k = 0; k < history; ++k) recent[k] = F(0.0f);
    }

    // Tokens t .. t + n - 1. d: gradients of the inputs of the tokens t - history .. t - history + n - 1.
    template <int n>
    NVFP4_INLINE_MEMBER void step(i64 t, F* d) {
        F inputs[history + n], s[n], pre[n], dpre[history + n];
        this->template read<n>(t, inputs);
        NVFP4_UNROLL
        for (int i = 0; i < n; ++i) dpre[history + i] = this->fetch(dy + (t + i) * p.dy_token);
        if (p.silu) {
            NVFP4_UNROLL
            for (int i = 0; i < n; ++i) s[i] = pre[i] = this->convolve(inputs + i);
            sigmoid<n>(s);
            NVFP4_UNROLL
            for (int i = 0; i < n; ++i) {
                dpre[history + i] = dpre[history + i] * s[i] * fma(pre[i], F(1.0f) - s[i], F(1.0f));
            }
        }
        NVFP4_UNROLL
        for (int i = 0; i < n; ++i) {
            NVFP4_UNROLL
            for (int k = 0; k < width; ++k) dtap[k] = fma(inputs[i + k], dpre[history + i], dtap[k]);
            dtap[width] = dtap[width] + dpre[history + i];
        }
        input_gradients<n>(dpre, d);
    }

    // dpre: of the tokens t - history .. t + n - 1; the first `history` are filled in here.
    template <int n>
    NVFP4_INLINE_MEMBER void input_gradients(F* dpre, F* d) {
        NVFP4_UNROLL
        for (int k = 0; k < history; ++k) dpre[k] = recent[k];
        NVFP4_UNROLL
        for (int i = 0; i < n; ++i) {
            d[i] = tap[history] * dpre[i];
            NVFP4_UNROLL
            for (int k = 1; k < width; ++k) d[i] = fma(tap[history - k], dpre[i + k], d[i]);
        }
        NVFP4_UNROLL
        for (int k = 0; k < history; ++k) recent[k] = dpre[n + k];
    }

    // One token near either end of the piece, where d may belong to the initial state or to another piece.
    NVFP4_INLINE_MEMBER void step_near_end(i64 t) {
        F d;
        if (t < at.length) {
            step<1>(t, &d);
        } else {
            F dpre[width];
            dpre[history] = F(0.0f);
            input_gradients<1>(dpre, &d);
            if (p.dstate) d = d + read_spread(p.dstate, p.dtype, this->entry(t - at.length), history, size(extent));
        }
        if (t - history >= at.first) {
            this->put(dx + (t - history) * p.channels, d);
        } else if (t < history && p.dinitial) {
            write_spread(p.dinitial, fp32, this->entry(t), history, size(extent), d);
        }
    }

    // sums: [width + 1, channels], of taps and bias.
    NVFP4_INLINE_MEMBER void run(float* sums) {
        for (i64 t = at.first;; ++t) {
            for (; t >= at.first + history && t + 2 <= at.last; t += 2) {
                F d[2];
                step<2>(t, d);
                this->put(dx + (t - history) * p.channels, d[0]);
                this->put(dx + (t - history + 1) * p.channels, d[1]);
            }
            if (t == at.last) add_to(sums);  // what later steps add to dtap belongs to the next piece
            if (t == at.last + history) return;
            step_near_end(t);
        }
    }

    NVFP4_INLINE_MEMBER void add_to(float* sums) const {
        NVFP4_UNROLL
        for (int k = 0; k <= width; ++k) {
            float* to = sums + k * p.channels + this->c;
            store(to, load(to, extent) + dtap[k], extent);
        }
    }
};

int useful_threads(const CausalConv1dParams& p) {
    const i64 most = p.tokens * p.channels / 16384 + 1;
    return static_cast<int>(p.threads < most ? p.threads : most);
}

}  // namespace

int causal_conv1d(const CausalConv1dParams& p) {
    if (!sound(p)) return 2;
    const int threads = useful_threads(p);
    const i64 share = p.tokens / threads, unit = share < 1 ? 1 : share < piece ? share : piece;
    const i64 units = p.tokens ? (p.tokens + unit - 1) / unit : 1;  // one, if only for the states of empty sequences
    auto body = [&](int t, int n) {
        const Range mine = part(units, 1, t, n);
        if (mine.begin == mine.end) return;
        const i64 end = mine.end * unit < p.tokens ? mine.end * unit : p.tokens;
        dispatch(p, [&](auto* type, auto width) {
            using T = std::remove_pointer_t<decltype(type)>;
            over_pieces(p, mine.begin * unit, end, [&](const Piece& at) {
                over_channels(p, [&](i64 c, auto extent) { ForwardWalk<T, width.value, decltype(extent)>(p, at, c, extent).run(); });
            });
        });
    };
    parallel(threads, body);
    return 0;
}

// Gradients of taps and bias: the tokens fall into at most 64 blocks, whatever the threads; blocks are added in order.
int causal_conv1d_backward(const CausalConv1dParams& p) {
    if (!sound(p)) return 2;
    const i64 block = p.tokens <= 64 * piece ? piece : (p.tokens + 63) / 64;
    const i64 blocks = p.tokens ? (p.tokens + block - 1) / block : 1, floats = (p.width + 1) * p.channels;
    static thread_local Scratch scratch;
    float* const sums_of_blocks = static_cast<float*>(scratch.get(blocks * floats * 4));
    if (!sums_of_blocks) return 1;
    auto body = [&](int t, int n) {
        const Range mine = part(blocks, 1, t, n);
        dispatch(p, [&](auto* type, auto width) {
            using T = std::remove_pointer_t<decltype(type)>;
            for (i64 b = mine.begin; b < mine.end; ++b) {
                float* sums = sums_of_blocks + b * floats;
                std::memset(sums, 0, static_cast<size_t>(floats) * 4);
                const i64 end = (b + 1) * block < p.tokens ? (b + 1) * block : p.tokens;
                over_pieces(p, b * block, end, [&](const Piece& at) {
                    over_channels(p, [&](i64 c, auto extent) {
                        BackwardWalk<T, width.value, decltype(extent)>(p, at, c, extent).run(sums);
                    });
                });
            }
        });
    };
    parallel(useful_threads(p), body);
    add_blocks(sums_of_blocks, blocks, floats, p.dtaps);
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// causal_conv1d on the CPU. A walk takes one vector of channels along the tokens of a piece of a sequence and keeps the last
// width - 1 inputs in registers; backward keeps as many gradients before the activation too. Pieces are short, so that the
// rows they touch stay in the caches and the TLB while the walks go over the channels. Moved: x and y once (backward: x, dy, dx).
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

constexpr i64 piece = 32;  // tokens

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

// The element type, the width and the extents of the vectors of a row of channels, as types: f(type, width) and f(c, extent).
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

// Rows of a state [sequences, channels, width - 1]: entry k of the channels c .. of a sequence.
template <class T>
F load_state(const T* state, i64 stride, int count) {
    T run[F::lanes] = {};
    for (int i = 0; i < count; ++i) run[i] = state[i * stride];
    return load(run);
}
template <class T>
void store_state(T* state, i64 stride, int count, F x) {
    T run[F::lanes];
    store(run, x);
    for (int i = 0; i < count; ++i) state[i * stride] = run[i];
}

// What a walk reads: the taps of its channels, and the inputs before its first token, oldest first.
template <class T, int width, class Extent>
struct Walk {
    static constexpr int history = width - 1;
    const CausalConv1dParams& p;
    const Piece& at;
    const i64 c;
    const Extent extent;
    const T* x;  // token 0 of the sequence
    F tap[width], bias, past[history];

    Walk(const CausalConv1dParams& params, const Piece& piece, i64 channel, Extent e)
        : p(params), at(piece), c(channel), extent(e) {
        x = static_cast<const T*>(p.x) + (p.starts ? p.starts[at.sequence] * p.x_token : at.sequence * p.x_row) + c;
        NVFP4_UNROLL
        for (int k = 0; k < width; ++k) tap[k] = load(p.taps + k * p.channels + c, extent);
        bias = p.bias ? load(p.bias + c, extent) : F(0.0f);
        NVFP4_UNROLL
        for (int k = 0; k < history; ++k) {
            const i64 t = at.first - history + k;
            past[k] = t >= 0 ? load(x + t * p.x_token, extent) : before(static_cast<int>(t) + history);
        }
    }

    F before(int k) const {
        if (!p.initial) return F(0.0f);
        return with_dtype(p.initial_dtype, [&](auto* type) {
            using S = std::remove_pointer_t<decltype(type)>;
            return load_state(static_cast<const S*>(p.initial) + entry(k), history, size(extent));
        });
    }

    // Where entry k of a state of these channels lies.
    i64 entry(int k) const { return (at.sequence * p.channels + c) * history + k; }

    // The value before the activation at a token whose input is `now`.
    F convolve(F now) const {
        F sum = bias;
        NVFP4_UNROLL
        for (int k = 0; k < history; ++k) sum = fma(tap[k], past[k], sum);
        return fma(tap[history], now, sum);
    }

    void advance(F now) {
        NVFP4_UNROLL
        for (int k = 0; k + 1 < history; ++k) past[k] = past[k + 1];
        past[history - 1] = now;
    }

    // The walk over the next channels comes back for the other half of these cache lines, then for the next ones.
    static F fetch(const T* row, Extent extent) {
        __builtin_prefetch(row + 2 * F::lanes);
        return load(row, extent);
    }
};

template <class T, int width, class Extent>
void forward_walk(const CausalConv1dParams& p, const Piece& at, i64 c, Extent extent) {
    Walk<T, width, Extent> walk(p, at, c, extent);
    T* y = static_cast<T*>(p.y) + start(p, at.sequence) * p.channels + c;
    for (i64 t = at.first; t < at.last; ++t) {
        const F now = walk.fetch(walk.x + t * p.x_token, extent), pre = walk.convolve(now);
        __builtin_prefetch(y + t * p.channels + 2 * F::lanes, 1);
        store(y + t * p.channels, p.silu ? silu(pre) : pre, extent);
        walk.advance(now);
    }
    if (at.last < at.length) return;
    NVFP4_UNROLL
    for (int k = 0; k < width - 1; ++k) {
        store_state(static_cast<T*>(p.state) + walk.entry(k), walk.history, size(extent), walk.past[k]);
    }
}

// dx[t] takes the gradients before the activation of the tokens t .. t + width - 1, so it is written width - 1 tokens later; at
// the end of a piece inside a sequence those of the next piece are formed as well. sums: [width + 1, channels], taps and bias.
template <class T, int width, class Extent>
void backward_walk(const CausalConv1dParams& p, const Piece& at, i64 c, Extent extent, float* sums) {
    Walk<T, width, Extent> walk(p, at, c, extent);
    constexpr int history = width - 1;
    const T* dy = static_cast<const T*>(p.dy) + (p.starts ? p.starts[at.sequence] * p.dy_token : at.sequence * p.dy_row) + c;
    T* dx = static_cast<T*>(p.dx) + start(p, at.sequence) * p.channels + c;
    F dtap[width + 1], recent[history];  // recent[j]: the gradient of token t - 1 - j
    NVFP4_UNROLL
    for (int k = 0; k <= width; ++k) dtap[k] = F(0.0f);
    NVFP4_UNROLL
    for (int k = 0; k < history; ++k) recent[k] = F(0.0f);

    auto gradient = [&](i64 t) {  // of token t, before the activation; advances the walk
        const F now = walk.fetch(walk.x + t * p.x_token, extent);
        F dpre = walk.fetch(dy + t * p.dy_token, extent);
        if (p.silu) {
            const F pre = walk.convolve(now), s = sigmoid(pre);
            dpre = dpre * s * fma(pre, F(1.0f) - s, F(1.0f));
        }
        if (t < at.last) {
            NVFP4_UNROLL
            for (int k = 0; k < history; ++k) dtap[k] = fma(walk.past[k], dpre, dtap[k]);
            dtap[history] = fma(now, dpre, dtap[history]);
            dtap[width] = dtap[width] + dpre;
        }
        walk.advance(now);
        return dpre;
    };
    auto input_gradient = [&](F dpre) {  // of token t - history
        F sum = walk.tap[0] * dpre;
        NVFP4_UNROLL
        for (int k = 0; k < history; ++k) sum = fma(walk.tap[k + 1], recent[k], sum);
        NVFP4_UNROLL
        for (int k = history - 1; k > 0; --k) recent[k] = recent[k - 1];
        recent[0] = dpre;
        return sum;
    };

    for (i64 t = at.first; t < at.last + history; ++t) {
        F d = input_gradient(t < at.length ? gradient(t) : F(0.0f));
        if (t >= at.length && p.dstate) {
            const T* last = static_cast<const T*>(p.dstate) + walk.entry(static_cast<int>(t - at.length));
            d = d + load_state(last, history, size(extent));
        }
        if (t - history >= at.first) {
            __builtin_prefetch(dx + (t - history) * p.channels + 2 * F::lanes, 1);
            store(dx + (t - history) * p.channels, d, extent);
        } else if (t < history && at.first == 0 && p.dinitial) {
            float* initial = p.dinitial + walk.entry(static_cast<int>(t));
            store_state(reinterpret_cast<Single*>(initial), history, size(extent), d);
        }
    }
    NVFP4_UNROLL
    for (int k = 0; k <= width; ++k) {
        float* to = sums + k * p.channels + c;
        store(to, load(to, extent) + dtap[k], extent);
    }
}

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
                over_channels(p, [&](i64 c, auto extent) { forward_walk<T, width.value>(p, at, c, extent); });
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
                    over_channels(p, [&](i64 c, auto extent) { backward_walk<T, width.value>(p, at, c, extent, sums); });
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

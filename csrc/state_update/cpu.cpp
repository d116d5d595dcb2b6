// state_update on the CPU. The states are all that takes time: four rows of a head's state go through all tokens while they
// are in the first-level cache, so that each state crosses memory once in each direction, and B and C are loaded once for four.
#include "params.h"

#include <cstring>
#include <type_traits>

#include "cpu/exp.h"
#include "cpu/runs.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "numerics/philox.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

constexpr int block = 4;  // rows

template <class T>
const T* place(const ScanView& v, i64 row, i64 token, i64 head) {
    return static_cast<const T*>(v.data) + row * v.row_stride + token * v.token_stride + head * v.head_stride;
}
template <class S>
S* place(const StateView& v, i64 row, i64 head) {
    return static_cast<S*>(v.data) + row * v.slot_stride + head * v.head_stride;
}

// `count` values of a view to fp32, zeros up to a whole vector.
void widen(const ScanView& v, i64 row, i64 token, i64 head, i64 count, float* to) {
    with_dtype(v.dtype, [&](auto* type) {
        const auto* from = place<std::remove_pointer_t<decltype(type)>>(v, row, token, head);
        over(count, [&](i64 i, int, auto extent) { store(to + i, load(from + i, extent)); });
    });
}

// The lanes that a run has; the others zero, whatever an Inf made of their zeros.
F within(F x, Whole) { return x; }
F within(F x, Part part) {
    float run[F::lanes];
    store(run, x);
    for (int i = part.count; i < F::lanes; ++i) run[i] = 0.0f;
    return load(run);
}

// |x| + r / 2^16 units of the last place of bf16 or fp16, cut off; r: 16 random bits. Carries go into the exponent.
F cut(F x, U r, int dropped) { return real((bits(x) + (r >> (16 - dropped))) >> dropped << dropped); }
F finite_or(F x, F rounded) { return select(less_int(bits(magnitude(x)), U(0x7F800000u)), rounded, x); }

F rounded(F x, U, const Single*) { return x; }
F rounded(F x, U r, const Brain*) { return finite_or(x, cut(x, r, 16)); }
F rounded(F x, U r, const Half*) {  // below 2^-14 the last place is 2^-24, whatever the exponent
    const F units = magnitude(x) * F(16777216.0f) + to_float(r) * F(1.52587890625e-5f);
    const auto small = less(magnitude(x), F(6.103515625e-5f));
    const F tiny = to_float(trunc_int(select(small, units, F(0.0f)))) * F(5.9604644775390625e-8f);
    return finite_or(x, select(small, real(bits(tiny) | (bits(x) & U(0x80000000u))), cut(x, r, 13)));
}

// Sixteen random bits for each of the elements first .. first + count - 1, at least; returns where `first` has its own.
// Element e takes the halfword e % 8 of draw e / 8.
const u16* draw(u64 first, i64 count, u64 offset, u64 seed, u16* to) {
    const u64 end = (first + static_cast<u64>(count) + 7) / 8;
    u16* out = to;
    for (u64 d = first / 8; d < end; d += F::lanes, out += 8 * F::lanes) {
        u32 low[F::lanes], high[F::lanes];
        for (int l = 0; l < F::lanes; ++l) {
            low[l] = static_cast<u32>(d + static_cast<u64>(l));
            high[l] = static_cast<u32>((d + static_cast<u64>(l)) >> 32);
        }
        const Draw<U> made = philox(load(low), load(high), offset, seed);
        u32 halves[2][2 * F::lanes];  // of each draw
        store_pairs(halves[0], made.word[0], made.word[1]);
        store_pairs(halves[1], made.word[2], made.word[3]);
        NVFP4_UNROLL
        for (int l = 0; l < F::lanes; ++l) {
            std::memcpy(out + 8 * l, halves[0] + 2 * l, 8);
            std::memcpy(out + 8 * l + 4, halves[1] + 2 * l, 8);
        }
    }
    return to + first % 8;
}

i64 whole(i64 count) { return (count + 15) / 16 * 16; }

// What a thread keeps in fp32 while it works at a head: all tokens of B, C (of the head's group), dt x and y.
struct Kept {
    i64 n, m;  // floats of a token of B and C, and of dt x and y
    float *B, *C, *u, *y, *decay;
    u16* noise;

    static i64 floats(const StateUpdateParams& p) {
        return 2 * p.tokens * (whole(p.state) + whole(p.head_dim)) + whole(p.tokens) + whole(block * p.state / 2 + 80);
    }
    Kept(const StateUpdateParams& p, float* at) : n(whole(p.state)), m(whole(p.head_dim)), B(at) {
        C = B + p.tokens * n;
        u = C + p.tokens * n;
        y = u + p.tokens * m;
        decay = y + p.tokens * m;
        noise = reinterpret_cast<u16*>(decay + whole(p.tokens));
    }
};

template <class S>
struct Head {
    const StateUpdateParams& p;
    i64 row, head;  // of the batch
    S *state, *made;  // the head's state in its slot and, if wanted, after the first token
    const Kept& kept;
};

// Rows i .. i + rows - 1 of a head's state through all tokens. Each sum is made in the order of the vectors, in any block.
template <int rows, bool noisy, class S>
void update_rows(const Head<S>& at, i64 i) {
    const StateUpdateParams& p = at.p;
    const Kept& kept = at.kept;
    const StateView& target = at.made ? p.intermediate : p.states;
    const S* from = at.state + i * p.states.row_stride;
    i64 from_stride = p.states.row_stride;
    for (i64 t = 0; t < p.tokens; ++t) {
        S* to = (at.made ? at.made + t * target.token_stride : at.state) + i * target.row_stride;
        const u16* noise = kept.noise;
        if (noisy) {
            const u64 first = static_cast<u64>(((at.row * p.heads + at.head) * p.head_dim + i) * p.state);
            noise = draw(first, rows * p.state, p.offset + static_cast<u64>(t), p.seed, kept.noise);
        }
        const float *B = kept.B + t * kept.n, *C = kept.C + t * kept.n;
        const F decay = kept.decay[t];
        F u[rows], sums[rows];
        NVFP4_UNROLL
        for (int r = 0; r < rows; ++r) {
            u[r] = F(kept.u[t * kept.m + i + r]);
            sums[r] = F(0.0f);
        }
        over(p.state, [&](i64 j, int, auto extent) {
            const F b = load(B + j), c = load(C + j);
            NVFP4_UNROLL
            for (int r = 0; r < rows; ++r) {
                const F after = fma(u[r], b, decay * load(from + r * from_stride + j, extent));
                S* const out = to + r * target.row_stride + j;
                store(out, noisy ? rounded(after, bits(load_bf16(noise + r * p.state + j)) >> 16, out) : after, extent);
                sums[r] = fma(within(after, extent), c, sums[r]);
            }
        });
        NVFP4_UNROLL
        for (int r = 0; r < rows; ++r) kept.y[t * kept.m + i + r] = sum(sums[r]);
        from = to;
        from_stride = target.row_stride;
    }
}

template <class S>
void update_head(const Head<S>& at) {
    const StateUpdateParams& p = at.p;
    i64 i = 0;
    for (; i + block <= p.head_dim; i += block) {
        if (p.stochastic) update_rows<block, true>(at, i);
        else update_rows<block, false>(at, i);
    }
    for (; i < p.head_dim; ++i) {
        if (p.stochastic) update_rows<1, true>(at, i);
        else update_rows<1, false>(at, i);
    }
}

// dt x and the decay of each token.
void steps(const StateUpdateParams& p, i64 row, i64 head, const Kept& kept) {
    for (i64 t = 0; t < p.tokens; ++t) {
        float run[F::lanes];
        widen(p.dt, row, t, head, 1, run);
        F step = run[0];
        if (p.dt_bias) step = step + F(p.dt_bias[head]);
        if (p.dt_softplus) step = softplus(step);
        step = least(F(p.high), greatest(F(p.low), step));  // a NaN comes back from both: it is the second operand
        store(run, exp(F(p.A[head]) * step));
        kept.decay[t] = run[0];
        float* const u = kept.u + t * kept.m;
        widen(p.x, row, t, head, p.head_dim, u);
        over(p.head_dim, [&](i64 i, int, auto) { store(u + i, step * load(u + i)); });
    }
}

// y of each token from the sums: the skip, the gate, the rounding. `used` is false for a row without a slot.
void finish(const StateUpdateParams& p, i64 row, i64 head, const Kept& kept, bool used) {
    for (i64 t = 0; t < p.tokens; ++t) {
        const i64 out = ((row * p.tokens + t) * p.heads + head) * p.head_dim;
        float *const y = kept.y + t * kept.m, *const given = kept.u + t * kept.m;
        if (used && p.D) {
            widen(p.x, row, t, head, p.head_dim, given);
            over(p.head_dim, [&](i64 i, int, auto extent) {
                const F D = p.D_of_channels ? load(p.D + head * p.head_dim + i, extent) : F(p.D[head]);
                store(y + i, fma(load(given + i), D, load(y + i)));
            });
        }
        if (used && p.z.data) {
            widen(p.z, row, t, head, p.head_dim, given);
            over(p.head_dim, [&](i64 i, int, auto) { store(y + i, load(y + i) * silu(load(given + i))); });
        }
        with_dtype(p.x.dtype, [&](auto* type) {
            auto* const to = static_cast<decltype(type)>(p.y) + out;
            over(p.head_dim, [&](i64 i, int, auto extent) { store(to + i, used ? load(y + i) : F(0.0f), extent); });
        });
    }
}

i64 slot(const StateUpdateParams& p, i64 row) { return p.indices ? p.indices[row] : row; }

}  // namespace

int state_update(const StateUpdateParams& p) {
    for (i64 b = 0; b < p.batch; ++b) {
        if (slot(p, b) >= p.slots) return 2;
    }
    const i64 units = p.batch * p.heads, most = units * p.head_dim * p.state / 16384 * p.tokens + 1;
    const int threads = static_cast<int>(p.threads < most ? p.threads : most);
    static thread_local Scratch scratch;
    float* const floats = static_cast<float*>(scratch.get(threads * Kept::floats(p) * 4));
    if (!floats) return 1;
    auto body = [&](int thread, int n) {
        const Range mine = part(units, 1, thread, n);
        const Kept kept(p, floats + thread * Kept::floats(p));
        i64 row = -1, group = -1;  // whose B and C are kept
        for (i64 unit = mine.begin; unit < mine.end; ++unit) {
            const i64 b = unit / p.heads, h = unit % p.heads, g = h / (p.heads / p.groups), s = slot(p, b);
            if (s < 0) {
                finish(p, b, h, kept, false);
                continue;
            }
            for (i64 t = 0; (row != b || group != g) && t < p.tokens; ++t) {
                widen(p.B, b, t, g, p.state, kept.B + t * kept.n);
                widen(p.C, b, t, g, p.state, kept.C + t * kept.n);
            }
            row = b, group = g;
            steps(p, b, h, kept);
            with_dtype(p.state_dtype, [&](auto* type) {
                using S = std::remove_pointer_t<decltype(type)>;
                S* const made = p.intermediate.data ? place<S>(p.intermediate, b, h) : nullptr;
                update_head(Head<S>{p, b, h, place<S>(p.states, s, h), made, kept});
            });
            finish(p, b, h, kept, true);
        }
    };
    parallel(threads, body);
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// A sequence is done in spans of up to 32 tokens. Spans begin anew with every chunk: a chunk's results so depend on the state
// before it and on its own tokens alone. The products with the state cost the same whatever the span, 4 head_dim x state a
// token and head; those among tokens grow with it, and the passes over the state, once a span, shrink.
#pragma once
#include "cpu/exp.h"
#include "cpu/scratch.h"
#include "forms.h"
#include "params.h"

namespace nvfp4 {
namespace NVFP4_ISA {

constexpr i64 span = 32;
constexpr int span_vectors = span / F::lanes;

struct Span {
    i64 start, count;  // tokens, from the start of the sequence
};

class Spans {
public:
    Spans(i64 length, i64 chunk_size)
        : length_(length), chunk_(at_most(chunk_size, length > 1 ? length : 1)), per_chunk_((chunk_ + span - 1) / span) {}
    i64 count() const { return length_ / chunk_ * per_chunk_ + (length_ % chunk_ + span - 1) / span; }
    Span operator[](i64 i) const {
        const i64 within = i % per_chunk_ * span, start = i / per_chunk_ * chunk_ + within;
        return {start, at_most(span, at_most(chunk_ - within, length_ - start))};
    }

private:
    i64 length_, chunk_, per_chunk_;
};

// Memory of one buffer dealt out in pieces of whole cache lines; with a null buffer it only counts.
class Pieces {
public:
    explicit Pieces(void* buffer) : base_(reinterpret_cast<__UINTPTR_TYPE__>(buffer)) {}
    template <class T>
    T* take(i64 count) {
        T* piece = reinterpret_cast<T*>(base_ + static_cast<__UINTPTR_TYPE__>(used));
        used += ceil_to(count * static_cast<i64>(sizeof(T)), 64);
        return piece;
    }
    i64 used = 0;

private:
    __UINTPTR_TYPE__ base_;
};

// The heads first .. first + heads of one group of one sequence: what a thread does at a time.
struct Work {
    const ScanSequence* sequence;
    i64 group, first, heads;
};

// The number of a sequence's token in outputs of all tokens.
static inline i64 token_number(const ScanParams& p, const Work& work, Span s) {
    return work.sequence->row * p.length + work.sequence->start + s.start;
}

// D of a head, zero where there is none.
static inline void read_skip(const ScanParams& p, i64 head, i64 padded, float* to) {
    for (i64 i = 0; i < padded; ++i) to[i] = p.D && i < p.head_dim ? p.D[head * p.head_dim + i] : 0.0f;
}

// How the heads of a group are shared among pieces of work.
struct Division {
    i64 heads, blocks;  // heads of a block, blocks of a group
    Division(const ScanParams& p, i64 most) {
        const i64 all = p.heads / p.groups;
        heads = at_most(most, all);
        blocks = (all + heads - 1) / heads;
    }
    i64 works(const ScanParams& p) const { return p.count * p.groups * blocks; }
    Work work(const ScanParams& p, i64 i) const {
        const i64 block = i % blocks, group = i / blocks % p.groups, all = p.heads / p.groups;
        return {p.sequences + i / blocks / p.groups, group, group * all + block * heads, at_most(heads, all - block * heads)};
    }
};

// The tokens of a span in a head (or group) of a view: f(pointer to the first token's elements).
template <class Function>
static inline void at_span(const ScanView& x, const Work& work, Span s, i64 head, Function f) {
    with_dtype(x.dtype, [&](auto* type) {
        f(static_cast<const std::remove_pointer_t<decltype(type)>*>(x.data) + work.sequence->row * x.row_stride +
          (work.sequence->start + s.start) * x.token_stride + head * x.head_stride);
    });
}

// These, widened, in panels.
static inline void read_view(const ScanView& x, const Work& work, Span s, i64 head, i64 cols, i64 padded, i64 width, float* to) {
    at_span(x, work, s, head, [&](auto* from) { read_rows(from, x.token_stride, s.count, cols, span, padded, width, to); });
}

// Starts fetching what the next read_view will want: short pieces of many rows, which no hardware prefetcher foresees. Inlined,
// since GCC takes a function that only prefetches for one without effect and drops its calls.
NVFP4_INLINE void prefetch_view(const ScanView& x, const Work& work, Span s, i64 head, i64 cols) {
    const i64 size = x.dtype == fp32 ? 4 : 2;
    const i64 start = work.sequence->row * x.row_stride + (work.sequence->start + s.start) * x.token_stride + head * x.head_stride;
    for (i64 r = 0; r < s.count; ++r) {
        const char* row = static_cast<const char*>(x.data) + (start + r * x.token_stride) * size;
        for (i64 i = 0; i < cols * size; i += 64) __builtin_prefetch(row + i, 0, 2);
    }
}

// The steps of a head's tokens in a span and how the state decays by them. As products of each token's exp(A dt), at most 1,
// the decays need no exponential of a difference: nothing overflows, however strong, and none loses digits to a long sum.
struct Decays {
    alignas(64) float raw[span];    // dt + dt_bias
    alignas(64) float step[span];   // dt after its rules; 0 beyond the span's tokens
    alignas(64) float each[span];   // exp(A dt)
    alignas(64) float into[span];   // decay from before the span to after the token
    alignas(64) float rest[span];   // decay from after the token to after the span; 0 beyond its tokens
    alignas(64) float onto[span];   // that times the token's step
    float through;                  // decay over all of the span

    void read(const ScanParams& p, const Work& work, Span s, i64 head) {
        at_span(p.dt, work, s, head, [&](auto* from) {
            for (i64 i = 0; i < span; i += 16) {
                const i64 left = s.count > i ? at_most(s.count - i, 16) : 0;
                widen_some(from + (left ? i * p.dt.token_stride : 0), p.dt.token_stride, static_cast<int>(left), raw + i);
            }
        });
        const F bias(p.dt_bias ? p.dt_bias[head] : 0.0f), rate(p.A[head]);
        for (i64 i = 0; i < span; i += F::lanes) {
            const F wanted = load(raw + i) + bias;
            F x = p.dt_softplus ? softplus(wanted) : wanted;
            x = least(F(p.high), greatest(F(p.low), x));
            x = select(less_int(lane_numbers() + U(static_cast<u32>(i)), U(static_cast<u32>(s.count))), x, F(0.0f));
            store(raw + i, wanted);
            store(step + i, x);
            store(each + i, exp(least(F(0.0f), rate * x)));
        }
        through = 1.0f;
        for (i64 i = 0; i < s.count; ++i) into[i] = through = through * each[i];
        float left = 1.0f;
        for (i64 i = s.count - 1; i >= 0; --i) {
            rest[i] = left;
            left = left * each[i];
        }
        for (i64 i = s.count; i < span; ++i) into[i] = rest[i] = 0.0f;
        for (i64 i = 0; i < span; i += F::lanes) store(onto + i, load(rest + i) * load(step + i));
    }
};

// Lanes 0 .. i of a row of the span, zero beyond; the vector starts at lane `start`.
NVFP4_INLINE F until(F x, i64 start, i64 i) {
    return select(less_int(lane_numbers() + U(static_cast<u32>(start)), U(static_cast<u32>(i + 1))), x, F(0.0f));
}

// Row i of a span's decays, made from row i - 1: from after token j to after token i, times factor j; zero for j > i.
NVFP4_INLINE void next_row(const float* factors, float decay, i64 i, F* row) {
    for (int v = 0; v < span_vectors; ++v) {
        const U lanes = lane_numbers() + U(static_cast<u32>(v * F::lanes));
        row[v] = select(equal(lanes, U(static_cast<u32>(i))), load(factors + v * F::lanes), row[v] * F(decay));
    }
}

// Row r of the tile, plus skip times row r of `input`, to out + r * stride: `rows` rows, `cols` columns at most.
template <class P, int vectors>
NVFP4_INLINE void write_tile(const Sums<vectors>& sums, int dtype, void* out, i64 start, i64 stride, i64 rows, i64 cols,
                             const float* skip, const float* input) {
    constexpr i64 width = vectors * F::lanes;
    alignas(64) float made[tile_rows * width];  // all rows, since registers have no numbers at run time
    for (int r = 0; r < tile_rows; ++r) {
        for (int v = 0; v < vectors; ++v) {
            const i64 at = r * width + v * F::lanes;
            store(made + at, fma(load(skip + v * F::lanes), load(input + at), sums.v[r][v]));
        }
    }
    with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T* to = static_cast<T*>(out) + start;
        for (i64 r = 0; r < rows; ++r, to += stride) {
            for (i64 i = 0; i < width && i < cols; i += 16) {
                T run[16];
                T* whole = cols - i < 16 ? run : to + i;
                for (int v = 0; v < 16; v += F::lanes) P::store_rounded(whole + v, load(made + r * width + i + v));
                if (whole == run) __builtin_memcpy(to + i, run, static_cast<size_t>(cols - i) * sizeof(T));
            }
        }
    });
}

// scores[i][j] = left_i . right_j where j <= i; what stands beyond is undefined. left kept and right turned, in panels of
// `width` of their `steps`.
template <class P>
static inline void score(const typename P::Step* left, const typename P::Step* right, i64 rows, i64 steps, i64 width,
                         float* scores) {
    each_lower_tile(rows, [&](i64 row, i64 col, auto vectors) {
        auto sums = Sums<vectors>::zero();
        for (i64 c = 0; c < steps; c += width) {
            const i64 w = at_most(width, steps - c);
            add_products<P>(sums, Left<P>{left + c * span + row * w, w, 1}, Right<P>{right + c * span + col, span}, w);
        }
        for (int r = 0; r < tile_rows; ++r) {
            for (int v = 0; v < vectors; ++v) store(scores + (row + r) * span + col + v * F::lanes, sums.v[r][v]);
        }
    });
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

// The gradients of some heads: the states before every span are formed again, then spans go from the last to the first.
#pragma once
#include <cmath>

#include "gradients.h"

namespace nvfp4 {
namespace NVFP4_ISA {

// Sums that several pieces of work have a share in; they are added up in order when all are done.
struct Partial {
    float *dB, *dC;         // [blocks, tokens, groups, state], or null where a group is one block
    double *dA, *ddt_bias;  // [sequences, heads]
    float* dD;              // [sequences, heads, head_dim]
};

// The states before the spans of a segment. A segment's states fill some megabytes; for each segment its first state is
// kept as well, from which the others are formed when their turn comes.
template <class P>
class States {
public:
    using Step = typename P::Step;

    States(const ScanParams& p, const Work& work, const Padded<P>& size, const Spans& spans)
        : p_(p), work_(work), size_(size), spans_(spans), whole_(work.heads * size.state) {
        const i64 fitting = (8 << 20) * P::values / 4 / whole_, root = static_cast<i64>(std::sqrt(static_cast<double>(spans.count())));
        segment_ = fitting > root ? fitting : root;
        segment_ = segment_ < 1 ? 1 : at_most(segment_, spans.count());
    }

    bool prepare() {
        static thread_local Scratch scratch;
        const i64 segments = segment_ ? (spans_.count() + segment_ - 1) / segment_ : 0;
        void* memory = nullptr;
        for (int pass = 0; pass < 2; ++pass) {
            Pieces pieces(memory);
            running_ = pieces.template take<float>(whole_);
            starts_ = pieces.template take<float>(segments * whole_);
            kept_ = pieces.template take<Step>(segment_ * whole_ / P::values);
            rows_ = pieces.template take<float>(span * size_.n);
            B_paired_ = pieces.template take<Step>(span * size_.n);
            x_ = pieces.template take<float>(span * size_.p);
            x_onto_ = pieces.template take<Step>(span * size_.p);
            if (pass == 0 && !(memory = scratch.get(pieces.used))) return false;
        }
        read_initial(p_, work_, p_.initial, size_, running_);
        for (i64 k = 0; k < spans_.count(); ++k) {
            if (k % segment_ == 0) {
                __builtin_memcpy(starts_ + k / segment_ * whole_, running_, static_cast<size_t>(whole_) * 4);
                if (k / segment_ == segments - 1) break;
            }
            advance(spans_[k], running_, running_, nullptr);
        }
        return true;
    }

    // Of head h before span k, kept; spans must be asked for from the last to the first.
    const Step* before(i64 k, i64 h) {
        const i64 segment = k / segment_;
        if (segment != ready_) {
            ready_ = segment;
            const float* at = starts_ + segment * whole_;
            store_kept<P>(at, whole_, kept_);
            for (i64 i = segment * segment_; i < k; ++i) {
                Step* next = kept_ + (i % segment_ + 1) * (whole_ / P::values);
                if constexpr (P::values == 1) {
                    advance(spans_[i], at, next, nullptr);
                    at = next;
                } else {
                    advance(spans_[i], at, running_, next);
                    at = running_;
                }
            }
        }
        return kept_ + (k % segment_ * whole_ + h * size_.state) / P::values;
    }

private:
    void advance(Span s, const float* from, float* to, Step* kept) {
        read_view(p_.B, work_, s, work_.group, p_.state, size_.n, size_.n, rows_);
        const auto* B = paired<P>(rows_, span, span, size_.n, size_.n, nullptr, B_paired_);
        for (i64 h = 0; h < work_.heads; ++h) {
            Decays decays;
            decays.read(p_, work_, s, work_.first + h);
            read_view(p_.x, work_, s, work_.first + h, p_.head_dim, size_.p, panel, x_);
            if (h + 1 < work_.heads) prefetch_view(p_.x, work_, s, work_.first + h + 1, p_.head_dim);
            const auto* x = paired<P>(x_, span, span, size_.p, panel, decays.onto, x_onto_);
            const i64 at = h * size_.state;
            pass_on<P>(from + at, to + at, decays.through, B, x, s.count, size_.n, size_.p,
                       kept ? kept + at / P::values : nullptr, nullptr);
        }
    }

    const ScanParams& p_;
    const Work& work_;
    const Padded<P>& size_;
    const Spans& spans_;
    i64 whole_, segment_, ready_ = -1;
    float *running_, *starts_, *rows_, *x_;
    Step *kept_, *B_paired_, *x_onto_;
};

// The slopes of a head's tokens in their steps, and what they add to the head's own parameters.
static inline void write_step_gradients(const ScanBackwardParams& p, const Decays& decays, const Slopes& slopes, Span s, i64 token,
                                        i64 head, double& dA, double& dbias) {
    alignas(64) float before[span], after[span], dstep[span];
    float sum = 0.0f;
    for (i64 i = 0; i < span; ++i) {
        before[i] = sum;
        sum += slopes.given[i] * decays.onto[i];
    }
    sum = 0.0f;
    for (i64 i = span - 1; i >= 0; --i) {
        after[i] = sum += slopes.entered[i] * decays.into[i];
    }
    const F rate(p.scan.A[head]), kept(slopes.kept);
    for (i64 i = 0; i < span; i += F::lanes) {
        const F step = load(decays.step + i), raw = load(decays.raw + i);
        const F drate = (load(slopes.across + i) + load(before + i)) + (load(after + i) + kept);  // in A dt
        F d = fma(drate, rate, load(slopes.taken + i) + load(slopes.given + i) * load(decays.rest + i));
        d = select(less(F(p.scan.low), step), select(less(step, F(p.scan.high)), d, F(0.0f)), F(0.0f));
        store(dstep + i, p.scan.dt_softplus ? d * sigmoid(raw) : d);
        store(after + i, drate * step);
    }
    double dA_here = 0.0, dbias_here = 0.0;
    for (i64 i = 0; i < s.count; ++i) {
        dA_here += after[i];
        dbias_here += dstep[i];
    }
    dA += dA_here;
    dbias += dbias_here;
    with_dtype(p.scan.dt.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T narrow[span];
        narrow16(dstep, narrow);
        narrow16(dstep + 16, narrow + 16);
        T* to = static_cast<T*>(p.ddt) + token * p.scan.heads + head;
        for (i64 i = 0; i < s.count; ++i) to[i * p.scan.heads] = narrow[i];
    });
}

// Rows of `cols` values from their transpose [cols][span].
static inline void write_turned(const float* from, i64 count, i64 cols, int dtype, void* out, i64 start, i64 stride) {
    Tile tile;
    for (i64 c = 0; c < cols; c += 16) {
        for (i64 r = 0; r < count; r += 16) {
            transpose16(from + c * span + r, span, tile.v[0], 16);
            with_dtype(dtype, [&](auto* type) {
                auto* to = static_cast<decltype(type)>(out) + start + r * stride + c;
                for (i64 i = 0; i < at_most(16, count - r); ++i) {
                    F row[vectors16];
                    for (int v = 0; v < vectors16; ++v) row[v] = load(tile.v[i] + v * F::lanes);
                    store_some(row, to + i * stride, static_cast<int>(at_most(16, cols - c)));
                }
            });
        }
    }
}

// What a group's heads share in a span: B and C in their forms.
template <class P>
struct Group {
    const typename P::Step *B_kept, *B_paired, *C_paired;

    Group(const ScanParams& p, const Work& work, const Padded<P>& size, Span s, const BackwardBuffers<P>& b) {
        const i64 n = size.n / P::values, all = span * size.n;
        read_view(p.C, work, s, work.group, p.state, size.n, size.n, b.C);
        read_view(p.B, work, s, work.group, p.state, size.n, size.n, b.B);
        turn(b.B, span, size.n, size.n, b.B_lanes);
        turn(b.C, span, size.n, size.n, b.C_lanes);
        B_kept = kept<P>(b.B, all, b.B_kept);
        turn(B_kept, span, n, n, b.B_turned);
        score<P>(kept<P>(b.C, all, b.C_kept), b.B_turned, ceil_to(s.count, tile_rows), n, n, b.scores);
        B_paired = paired<P>(b.B, span, span, size.n, size.n, nullptr, b.B_paired);
        C_paired = paired<P>(b.C, span, span, size.n, size.n, nullptr, b.C_paired);
        for (float* sums : {b.dB, b.dC}) __builtin_memset(sums, 0, static_cast<size_t>(all) * 4);
        __builtin_memset(b.dscores, 0, sizeof(float) * span * span);
    }
};

// One head's part of a span: dx, ddt, and shares of dscores, dB, dC, dA, dD and ddt_bias; its dstates go one span back.
template <class P>
static inline void add_head(const ScanBackwardParams& p, const Work& work, const Padded<P>& size, Span s, i64 h,
                            const Group<P>& group, const typename P::Step* state, const BackwardBuffers<P>& b) {
    const i64 head = work.first + h, token = token_number(p.scan, work, s);
    float* dstate = b.dstates + h * size.state;
    Decays decays;
    Slopes slopes{};
    decays.read(p.scan, work, s, head);
    read_skip(p.scan, head, size.p, b.skip);
    read_view(p.scan.x, work, s, head, p.scan.head_dim, size.p, panel, b.x);
    read_view(p.dy, work, s, head, p.scan.head_dim, size.p, panel, b.dy);
    if (h + 1 < work.heads) {
        prefetch_view(p.scan.x, work, s, head + 1, p.scan.head_dim);
        prefetch_view(p.dy, work, s, head + 1, p.scan.head_dim);
    }
    turn(kept<P>(b.x, span * size.p, b.x_kept), span, size.p / P::values, panel / P::values, b.x_turned);
    const auto* dy = kept<P>(b.dy, span * size.p, b.dy_kept);
    turn(dy, span, size.p / P::values, panel / P::values, b.dy_turned);
    score<P>(dy, b.x_turned, ceil_to(s.count, tile_rows), size.p / P::values, panel / P::values, b.dmixed);
    differentiate_pairs(decays, b.scores, b.dmixed, s.count, b.mixed, b.dscores, b.pairs, slopes);

    typename P::Step* narrow_kept = b.dstates_kept + h * size.state / P::values;
    typename P::Step* narrow_paired = b.dstates_paired + h * size.state / P::values;
    const auto *dstate_kept = either<P>(dstate, narrow_kept), *dstate_paired = either<P>(dstate, narrow_paired);
    add_through_state<P>(state, b.dy_turned, size, decays.into, b.C_lanes, b.dC, slopes.entered);
    add_through_state<P>(dstate_kept, b.x_turned, size, decays.onto, b.B_lanes, b.dB, slopes.given);
    slopes.kept = decays.through * dot_all(dstate_kept, state, size.state / P::values);
    write_step_gradients(p, decays, slopes, s, token, head, b.dA[h], b.ddt_bias[h]);

    const auto* mixed = paired<P>(b.mixed, ceil_to(s.count, P::values), span, span, span, nullptr, b.mixed_paired);
    const auto* dy_paired = paired<P>(b.dy, span, span, size.p, panel, nullptr, b.dy_paired);
    write_dx<P>(p, b, size, group.B_kept, dstate_paired, mixed, dy_paired, decays.onto, s.count, token, head);
    if (p.dD) add_skip_gradient(b.x, b.dy, s.count, size.p, b.dD + h * size.p);

    dy_paired = paired<P>(b.dy, span, span, size.p, panel, decays.into, b.dy_into);
    pass_on<P>(dstate, dstate, decays.through, group.C_paired, dy_paired, s.count, size.n, size.p, narrow_kept, narrow_paired);
}

// dB and dC of a span, once all heads have added to them.
template <class P>
static inline void write_group(const ScanBackwardParams& p, const Work& work, i64 block, const Padded<P>& size, Span s,
                               const Group<P>& group, const Partial& partial, const BackwardBuffers<P>& b) {
    const ScanParams& f = p.scan;
    const auto* turned = kept<P>(b.dscores, span * span, b.dscores_kept);
    turn(turned, span, span / P::values, span / P::values, b.dscores_turned);
    add_through_scores<P>(group.B_paired, b.dscores_turned, s.count, size.n, b.dC);
    add_through_scores<P>(group.C_paired, paired<P>(b.dscores, span, span, span, span, nullptr, b.dscores_paired), s.count, size.n, b.dB);
    const i64 stride = f.groups * f.state, start = token_number(f, work, s) * stride + work.group * f.state;
    if (partial.dB) {
        const i64 place = block * f.rows * f.length * stride + start;
        write_turned(b.dB, s.count, f.state, fp32, partial.dB, place, stride);
        write_turned(b.dC, s.count, f.state, fp32, partial.dC, place, stride);
    } else {
        write_turned(b.dB, s.count, f.state, f.B.dtype, p.dB, start, stride);
        write_turned(b.dC, s.count, f.state, f.C.dtype, p.dC, start, stride);
    }
}

// False when memory ran out.
template <class P>
static inline bool backward(const ScanBackwardParams& p, const Work& work, i64 block, const Partial& partial) {
    static thread_local Scratch scratch;
    const ScanParams& f = p.scan;
    const Padded<P> size(f);
    Pieces needed(nullptr);
    BackwardBuffers<P>(needed, size, work.heads);
    void* memory = scratch.get(needed.used);
    const Spans spans(work.sequence->length, f.chunk_size);
    States<P> states(f, work, size, spans);
    if (!memory || !states.prepare()) return false;
    Pieces pieces(memory);
    const BackwardBuffers<P> b(pieces, size, work.heads);

    read_initial(f, work, p.dlast, size, b.dstates);
    if constexpr (P::values > 1) {
        store_kept<P>(b.dstates, work.heads * size.state, b.dstates_kept);
        for (i64 h = 0; h < work.heads; ++h) {
            const i64 at = h * size.state;
            paired<P>(b.dstates + at, size.n, size.n, size.p, panel, nullptr, b.dstates_paired + at / P::values);
        }
    }
    for (i64 h = 0; h < work.heads; ++h) b.dA[h] = b.ddt_bias[h] = 0.0;
    for (i64 i = 0; i < work.heads * size.p; ++i) b.dD[i] = 0.0f;
    for (i64 k = spans.count() - 1; k >= 0; --k) {
        const Span s = spans[k];
        const Group<P> group(f, work, size, s, b);
        for (i64 h = 0; h < work.heads; ++h) add_head<P>(p, work, size, s, h, group, states.before(k, h), b);
        write_group<P>(p, work, block, size, s, group, partial, b);
    }
    if (p.dinitial) write_last(f, work, b.dstates, size, p.dinitial);
    const i64 first = work.sequence->index * f.heads + work.first;
    for (i64 h = 0; h < work.heads; ++h) {
        partial.dA[first + h] = b.dA[h];
        partial.ddt_bias[first + h] = b.ddt_bias[h];
        for (i64 i = 0; p.dD && i < f.head_dim; ++i) partial.dD[(first + h) * f.head_dim + i] = b.dD[h * size.p + i];
    }
    return true;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

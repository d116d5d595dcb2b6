// The parts of the gradients of some heads within a span.
#pragma once
#include <initializer_list>

#include "state.h"

namespace nvfp4 {
namespace NVFP4_ISA {

template <class P>
struct BackwardBuffers {
    using Step = typename P::Step;
    float *B, *C, *B_lanes, *C_lanes;  // of the group: rows, and [state][token]
    Step *B_kept, *C_kept, *B_turned, *B_paired, *C_paired;
    float *scores, *dscores, *dB, *dC;  // d...: sums over the heads, dB and dC [state][token]
    Step *dscores_paired, *dscores_kept, *dscores_turned;
    float *x, *dy, *skip, *mixed, *dmixed, *pairs;  // of a head
    Step *x_kept, *x_turned, *dy_kept, *dy_turned, *dy_paired, *dy_into, *mixed_paired;
    float *dstates, *dD;  // of all heads
    Step *dstates_kept, *dstates_paired;
    double *dA, *ddt_bias;

    BackwardBuffers(Pieces& from, const Padded<P>& size, i64 heads) {
        for (float** to : {&B, &C, &B_lanes, &C_lanes, &dB, &dC}) *to = from.take<float>(span * size.n);
        for (Step** to : {&B_kept, &C_kept, &B_turned, &B_paired, &C_paired}) *to = from.take<Step>(span * size.n);
        for (float** to : {&scores, &dscores, &mixed, &dmixed, &pairs}) *to = from.take<float>(span * span);
        for (Step** to : {&dscores_paired, &dscores_kept, &dscores_turned, &mixed_paired}) *to = from.take<Step>(span * span);
        for (float** to : {&x, &dy}) *to = from.take<float>(span * size.p);
        for (Step** to : {&x_kept, &x_turned, &dy_kept, &dy_turned, &dy_paired, &dy_into}) *to = from.take<Step>(span * size.p);
        for (Step** to : {&dstates_kept, &dstates_paired}) *to = from.take<Step>(P::values == 1 ? 0 : heads * size.state);
        skip = from.take<float>(size.p);
        dstates = from.take<float>(heads * size.state);
        dD = from.take<float>(heads * size.p);
        dA = from.take<double>(heads);
        ddt_bias = from.take<double>(heads);
    }
};

// Of a head's tokens in a span, by lanes.
struct Slopes {
    alignas(64) float given[span];    // sum over p and n of dS[n][p] x_j[p] B_j[n]
    alignas(64) float entered[span];  // sum over p and n of S[n][p] dy_i[p] C_i[n]
    alignas(64) float taken[span];    // sum over i >= j of dmixed[i][j] scores[i][j] exp(a_i - a_j)
    alignas(64) float across[span];   // of all pairs i >= k > j, times dt_j: what crosses token k's decay within the span
    float kept;                       // sum of dS exp(a_last) S
};

// From dmixed[i][j] = dy_i . x_j: the head's mixed, its share of dscores, and what its pairs say of the steps and decays.
// Sums of what crosses a decay, never differences of sums: a small slope keeps its digits beside large ones.
static inline void differentiate_pairs(const Decays& decays, const float* scores, const float* dmixed, i64 count, float* mixed,
                                       float* dscores, float* pairs, Slopes& slopes) {
    alignas(64) float ones[span];
    for (float& one : ones) one = 1.0f;
    F row[span_vectors], step[span_vectors];
    for (int v = 0; v < span_vectors; ++v) {
        row[v] = F(0.0f);
        step[v] = load(decays.step + v * F::lanes);
    }
    for (i64 i = 0; i < count; ++i) {
        next_row(ones, decays.each[i], i, row);
        for (int v = 0; v < span_vectors; ++v) {
            const i64 at = i * span + v * F::lanes, lane = v * F::lanes;
            const F score = until(load(scores + at), lane, i), slope = until(load(dmixed + at), lane, i) * row[v];
            store(mixed + at, score * row[v] * step[v]);
            store(dscores + at, load(dscores + at) + slope * step[v]);
            store(pairs + at, slope * score);
        }
    }
    F below[span_vectors];
    for (int v = 0; v < span_vectors; ++v) below[v] = F(0.0f);
    for (i64 k = count - 1; k >= 0; --k) {
        F crossing(0.0f);
        for (int v = 0; v < span_vectors; ++v) {
            below[v] = below[v] + load(pairs + k * span + v * F::lanes);
            crossing = fma(until(below[v], v * F::lanes, k - 1), step[v], crossing);
        }
        slopes.across[k] = sum(crossing);
    }
    for (int v = 0; v < span_vectors; ++v) store(slopes.taken + v * F::lanes, below[v]);
    for (i64 i = count * span; i < ceil_to(count, 2) * span; ++i) mixed[i] = 0.0f;  // half of a last step of two tokens
}

// dx_j = onto_j dS B_j + sum_{i >= j} mixed[i][j] dy_i + D dy_j
template <class P>
static inline void write_dx(const ScanBackwardParams& p, const BackwardBuffers<P>& b, const Padded<P>& size,
                            const typename P::Step* B, const typename P::Step* dstate, const typename P::Step* mixed,
                            const typename P::Step* dy, const float* onto, i64 count, i64 token, i64 head) {
    const i64 n = size.n / P::values, stride = p.scan.heads * p.scan.head_dim;
    const i64 start = token * stride + head * p.scan.head_dim, steps = (count + P::values - 1) / P::values;
    each_tile(ceil_to(count, tile_rows), size.p, [&](i64 row, i64 col, auto vectors) {
        constexpr i64 width = vectors * F::lanes;
        const i64 before = row / P::values;
        auto sums = Sums<vectors>::zero();
        add_products<P>(sums, Left<P>{B + row * n, n, 1}, Right<P>{dstate + col * n, width}, n);
        sums.scale_rows(onto + row);
        add_products<P>(sums, Left<P>{mixed + before * span + row, 1, span},
                        Right<P>{dy + col * (span / P::values) + before * width, width}, steps - before);
        write_tile<P>(sums, p.scan.x.dtype, p.dx, start + row * stride + col, stride, at_most(tile_rows, count - row),
                   p.scan.head_dim - col, b.skip + col, b.dy + col * span + row * width);
    });
}

// grads[n][i] += factor_i sum_p state[n][p] rows[i][p]; dots_i += sum_n lanes[n][i] sum_p state[n][p] rows[i][p].
// state kept, rows turned.
template <class P>
static inline void add_through_state(const typename P::Step* state, const typename P::Step* rows, const Padded<P>& size,
                                     const float* factors, const float* lanes, float* grads, float* dots) {
    each_tile(size.n, span, [&](i64 row, i64 col, auto vectors) {
        auto sums = Sums<vectors>::zero();
        for (i64 c = 0; c < size.p; c += panel) {
            const i64 w = at_most(panel, size.p - c) / P::values, at = c / P::values;
            add_products<P>(sums, Left<P>{state + at * size.n + row * w, w, 1}, Right<P>{rows + at * span + col, span}, w);
        }
        for (int v = 0; v < vectors; ++v) {
            const F factor = load(factors + col + v * F::lanes);
            F total = load(dots + col + v * F::lanes);
            for (int r = 0; r < tile_rows; ++r) {
                const i64 at = (row + r) * span + col + v * F::lanes;
                store(grads + at, fma(sums.v[r][v], factor, load(grads + at)));
                total = fma(sums.v[r][v], load(lanes + at), total);
            }
            store(dots + col + v * F::lanes, total);
        }
    });
}

// grads[n][i] += sum_j left[j][n] right[j][i], both paired over j.
template <class P>
static inline void add_through_scores(const typename P::Step* left, const typename P::Step* right, i64 count, i64 n, float* grads) {
    each_tile(n, span, [&](i64 row, i64 col, auto vectors) {
        Sums<vectors> sums;
        float* at = grads + row * span + col;
        for (int r = 0; r < tile_rows; ++r) {
            for (int v = 0; v < vectors; ++v) sums.v[r][v] = load(at + r * span + v * F::lanes);
        }
        add_products<P>(sums, Left<P>{left + row, 1, n}, Right<P>{right + col, span}, (count + P::values - 1) / P::values);
        for (int r = 0; r < tile_rows; ++r) {
            for (int v = 0; v < vectors; ++v) store(at + r * span + v * F::lanes, sums.v[r][v]);
        }
    });
}

// dD += sum_i dy_i x_i, by channel.
static inline void add_skip_gradient(const float* x, const float* dy, i64 count, i64 p, float* dD) {
    for (i64 c = 0; c < p; c += panel) {
        const i64 w = at_most(panel, p - c);
        for (i64 v = 0; v < w; v += F::lanes) {
            F total(0.0f);
            for (i64 i = 0; i < count; ++i) {
                const i64 at = c * span + i * w + v;
                total = fma(load(x + at), load(dy + at), total);
            }
            store(dD + c + v, load(dD + c + v) + total);
        }
    }
}

// Sum over all steps of a . b.
template <class Step>
static inline float dot_all(const Step* a, const Step* b, i64 steps) {
    F part[4] = {F(0.0f), F(0.0f), F(0.0f), F(0.0f)};
    for (i64 i = 0; i < steps; i += 4 * F::lanes) {
        for (int v = 0; v < 4; ++v) part[v] = dot(part[v], load(a + i + v * F::lanes), load(b + i + v * F::lanes));
    }
    return sum((part[0] + part[1]) + (part[2] + part[3]));
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

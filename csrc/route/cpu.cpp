// route on the CPU: a token's choice by insertion into a short list, which few of its experts enter (k (1 + ln(E / k)) of E in
// random order: 91 of 512 for 22), then a counting sort of the slots, tokens in order within an expert.
#include "params.h"

#include <atomic>

#include "cpu/exp.h"
#include "cpu/runs.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

// Larger for a better choice: by value, NaN above all, equal values by index, the lower first.
u64 key(float value, i64 index) {
    const u32 b = bits(F32x1(value + 0.0f)).v;  // -0 counts as 0
    const u32 ordered = (b & 0x7FFFFFFFu) > 0x7F800000u ? 0xFFFFFFFFu : b >> 31 ? ~b : b | 0x80000000u;
    return static_cast<u64>(ordered) << 32 | (0xFFFFFFFFu - static_cast<u32>(index));
}
i64 index_of(u64 key) { return 0xFFFFFFFFu - static_cast<u32>(key); }

// The `most` largest keys offered, largest first.
struct Best {
    u64* keys;
    i64 most, held = 0;
    void offer(u64 key) {
        if (held < most) {
            ++held;
        } else if (key <= keys[most - 1]) {
            return;
        }
        i64 i = held - 1;
        for (; i > 0 && keys[i - 1] < key; --i) keys[i] = keys[i - 1];
        keys[i] = key;
    }
};

// A thread's memory for one token.
struct Token {
    float *scores, *choice, *group_sums;
    u64 *keys, *group_keys;

    static i64 bytes(const RouteParams& p) { return (p.experts * 2 + p.groups) * 4 + 8 + (p.top_k + p.top_groups) * 8; }
    Token(void* memory, const RouteParams& p) {
        keys = static_cast<u64*>(memory);
        group_keys = keys + p.top_k;
        scores = reinterpret_cast<float*>(group_keys + p.top_groups);
        choice = scores + p.experts;
        group_sums = choice + p.experts;
    }
};

// Where the groups are several: the choice of all but the best groups' experts becomes -Inf.
void limit_groups(const RouteParams& p, Token& t) {
    const i64 size = p.experts / p.groups;
    Best groups{t.group_keys, p.top_groups};
    for (i64 g = 0; g < p.groups; ++g) {
        u64 two[2];
        Best best{two, size < 2 ? size : 2};
        for (i64 i = 0; i < size; ++i) best.offer(key(t.choice[g * size + i], i));
        float sum = t.choice[g * size + index_of(two[0])];
        if (size > 1) sum += t.choice[g * size + index_of(two[1])];
        t.group_sums[g] = sum;
        groups.offer(key(sum, g));
    }
    const float minus_infinity = real(U32x1(0xFF800000u)).v;
    for (i64 g = 0; g < p.groups; ++g) {
        bool allowed = false;
        for (i64 i = 0; i < p.top_groups; ++i) allowed = allowed || index_of(t.group_keys[i]) == g;
        for (i64 i = 0; !allowed && i < size; ++i) t.choice[g * size + i] = minus_infinity;
    }
}

// Fills the scores, and the keys of the chosen experts; returns what the chosen scores are divided by.
float choose(const RouteParams& p, i64 token, Token& t) {
    const float* logits = p.logits + token * p.experts;
    over(p.experts, [&](i64 i, int, auto extent) {
        const F score = sigmoid(load(logits + i, extent));
        store(t.scores + i, score, extent);
        store(t.choice + i, p.bias ? score + load(p.bias + i, extent) : score, extent);
    });
    if (p.groups > 1) limit_groups(p, t);
    Best best{t.keys, p.top_k};
    for (i64 e = 0; e < p.experts; ++e) best.offer(key(t.choice[e], e));
    float sum = 0.0f;
    for (i64 c = 0; c < p.top_k; ++c) sum += t.scores[index_of(t.keys[c])];
    return p.normalize ? sum + 1e-20f : 1.0f;
}

int threads_for(const RouteParams& p) {
    const i64 most = p.tokens * p.experts / 8192 + 1;
    return static_cast<int>(p.threads < most ? p.threads : most);
}

// f(thread, threads, memory for a token) on `threads` threads; false where one of them got no memory.
template <class Function>
bool each_thread(const RouteParams& p, int threads, Function f) {
    std::atomic<bool> failed{false};
    auto body = [&](int thread, int n) {
        static thread_local Scratch scratch;
        void* memory = scratch.get(Token::bytes(p));
        if (!memory) {
            failed = true;
            return;
        }
        Token token(memory, p);
        f(thread, n, token);
    };
    parallel(threads, body);
    return !failed;
}

}  // namespace

int route(const RouteParams& p) {
    const DefaultFloats floats;
    const int parts = threads_for(p);
    static thread_local Scratch shared;
    i64* counts = static_cast<i64*>(shared.get(parts * p.experts * 8));  // [parts, experts]
    if (!counts) return 1;
    const bool picked = each_thread(p, parts, [&](int thread, int n, Token& t) {
        for (int number = thread; number < parts; number += n) {
            i64* count = counts + number * p.experts;
            for (i64 e = 0; e < p.experts; ++e) count[e] = 0;
            const Range tokens = part(p.tokens, 1, number, parts);
            for (i64 token = tokens.begin; token < tokens.end; ++token) {
                const float divisor = choose(p, token, t);
                for (i64 c = 0; c < p.top_k; ++c) {
                    const i64 e = index_of(t.keys[c]);
                    p.indices[token * p.top_k + c] = e;
                    p.weights[token * p.top_k + c] = t.scores[e] / divisor * p.scale;
                    ++count[e];
                }
            }
        }
    });
    if (!picked) return 1;
    i64 row = 0;
    for (i64 e = 0; e < p.experts; ++e) {  // counts become the first row of each part's slots of each expert
        p.offsets[e] = row;
        for (int number = 0; number < parts; ++number) {
            const i64 count = counts[number * p.experts + e];
            counts[number * p.experts + e] = row;
            row += count;
        }
    }
    p.offsets[p.experts] = row;
    auto place = [&](int thread, int n) {
        for (int number = thread; number < parts; number += n) {
            const Range tokens = part(p.tokens, 1, number, parts);
            for (i64 slot = tokens.begin * p.top_k; slot < tokens.end * p.top_k; ++slot) {
                const i64 at = counts[number * p.experts + p.indices[slot]]++;
                p.inverse[slot] = at;
                p.order[at] = slot;
            }
        }
    };
    parallel(parts, place);
    return 0;
}

// With w_i = scale s_i / S: ds_i = scale (dw_i - sum_j dw_j s_j / S) / S, where S is a sum and not 1; dlogit = ds s (1 - s).
int route_backward(const RouteBackwardParams& b) {
    const DefaultFloats floats;
    const RouteParams& p = b.forward;
    const bool done = each_thread(p, threads_for(p), [&](int thread, int n, Token& t) {
        const Range tokens = part(p.tokens, 1, thread, n);
        for (i64 token = tokens.begin; token < tokens.end; ++token) {
            const float divisor = choose(p, token, t);
            const float* dweights = b.dweights + token * p.top_k;
            float* dlogits = b.dlogits + token * p.experts;
            for (i64 e = 0; e < p.experts; ++e) dlogits[e] = 0.0f;
            float mean = 0.0f;
            for (i64 c = 0; p.normalize && c < p.top_k; ++c) mean += dweights[c] * (t.scores[index_of(t.keys[c])] / divisor);
            for (i64 c = 0; c < p.top_k; ++c) {
                const i64 e = index_of(t.keys[c]);
                const float s = t.scores[e];
                dlogits[e] = p.scale * (dweights[c] - mean) / divisor * s * (1.0f - s);
            }
        }
    });
    return done ? 0 : 1;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4

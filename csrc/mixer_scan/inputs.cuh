// A block of mixer_scan: its shared memory, what it reads and convolves, and what of that it hands to its cluster.
#pragma once
#include "arch/ptx_cluster.cuh"
#include "launch.h"

namespace nvfp4 {

constexpr int tokens = 64, head_dim = 64, states = 128;  // tokens: of a chunk
constexpr int before = 3;                                // tokens that the convolution looks back
constexpr int squares_below = 10;                        // 16x16 squares of a chunk's scores on and below the diagonal
constexpr float log2e = 1.4426950408889634f;

template <int heads, int cluster>
struct Memory {
    static constexpr int width = heads * head_dim, slice = 2 * states / cluster;  // slice: of the group's B and C
    u16 x_in[before + tokens][width];
    // of rows from z to C, pieces of 16 bytes are exchanged by the row's number modulo 8
    u16 z[tokens][width];
    u16 x[tokens][width];
    u16 B[tokens][states], C[tokens][states];
    u16 scores[heads][squares_below][16 * 16];
    u16 bc_in[before + tokens][slice];
    alignas(16) float taps[before + 2][width + slice];  // the bias last
    alignas(16) float norm_weight[width];
    float log_decay[heads][tokens], step[heads][tokens];  // log2, from the chunk's start
    float from_start[heads][tokens], to_end[heads][tokens];  // decays; to_end times the step
    float squares[4 * heads][tokens];                        // of a warp's channels
    float sums[cluster][tokens];                             // of each block's
};

struct alignas(8) Two {
    float x, y;
};
struct alignas(8) Words {
    u32 x, y;
};

static __device__ __forceinline__ void widen(u32 word, float* out) {
    out[0] = real(U32x1(word << 16)).v;
    out[1] = real(U32x1(word & 0xFFFF0000u)).v;
}
static __device__ __forceinline__ u32 scaled(u32 word, Two by) {
    float v[2];
    widen(word, v);
    return pack_bf16(v[0] * by.x, v[1] * by.y);
}
static __device__ __forceinline__ float logistic(float x) { return fast_reciprocal(1.0f + fast_exp2(-log2e * x)); }
static __device__ __forceinline__ Two two(const float* at) { return *reinterpret_cast<const Two*>(at); }

template <int heads, int cluster>
struct Inputs {
    using M = Memory<heads, cluster>;
    static constexpr int threads = 128 * heads, width = M::width, slice = M::slice, half = cluster / 2;

    const MixerScanLaunch& p;
    M& m;
    int thread, warp, lane, g, q, head, part;  // lane 4 g + q; warp `part` of the block's head `head`
    const int rank = static_cast<int>(blockIdx.x % cluster);
    const int sequence = static_cast<int>(blockIdx.y), first_head = static_cast<int>(blockIdx.x) * heads;
    const int all_heads = p.groups * cluster * heads, channels = all_heads * head_dim + 2 * p.groups * states;
    int token, end;  // of all tokens: the chunk's first, and the one behind the sequence
    u16 dt[2];       // of the next chunk's tokens 2 lane and the one behind, in the head's first warp

    __device__ __forceinline__ Inputs(const MixerScanLaunch& p, M& m) : p(p), m(m) {
        find_place();
        token = static_cast<int>(p.cu_seqlens ? p.cu_seqlens[sequence] : sequence * p.length);
        end = static_cast<int>(p.cu_seqlens ? p.cu_seqlens[sequence + 1] : token + p.length);
    }

    // The first channel of its slice, formed where it is wanted, as find_place.
    __device__ __forceinline__ int bc_channel() const {
        u32 block = blockIdx.x;
        keep_in_register(block);
        const int rank = static_cast<int>(block % cluster), group = static_cast<int>(block / cluster);
        return all_heads * head_dim + (rank / half * p.groups + group) * states + rank % half * slice;
    }

    // Anew in each chunk: addresses kept for the next would not fit the registers.
    __device__ __forceinline__ void find_place() {
        u32 index = threadIdx.x;
        keep_in_register(index);
        thread = static_cast<int>(index & (threads - 1)), warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
        head = warp / 4, part = warp % 4;
    }

    // Rows of 16-byte pieces, from row `first` on, of which row `rows` - 64 is token `chunk`; zeros from the sequence's end on.
    template <int rows, int columns, bool exchanged>
    __device__ __forceinline__ void fetch(
        u16 (&to)[rows][columns], const TokensLaunch& t, int channel, int chunk, int first) const {
        constexpr int pieces = columns / 8;
        const int piece = thread % pieces;
        const u16* const from = t.data + (chunk - (rows - tokens)) * t.stride + channel + piece * 8;
        NVFP4_KEEP_LOOP
        for (int row = thread / pieces; row < rows; row += threads / pieces) {
            if (row < first) continue;
            u16* const place = to[row] + (exchanged ? piece ^ (row & 7) : piece) * 8;
            copy_async16(place, from + row * t.stride, chunk - (rows - tokens) + row < end ? 16 : 0);
        }
    }
    // Of the chunk that begins with token `chunk`, if there is one.
    __device__ __forceinline__ void fetch_inputs(int chunk, bool first) const {
        if (chunk < end) {
            fetch<before + tokens, width, false>(m.x_in, p.xBC, first_head * head_dim, chunk, first ? before : 0);
            fetch<before + tokens, slice, false>(m.bc_in, p.xBC, bc_channel(), chunk, first ? before : 0);
        }
        commit_copies();
    }
    __device__ __forceinline__ void fetch_z(int chunk) const {
        if (chunk < end) fetch<tokens, width, true>(m.z, p.z, first_head * head_dim, chunk, 0);
        commit_copies();
    }
    __device__ __forceinline__ void fetch_dt(int chunk) {
        NVFP4_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int t = chunk + 2 * lane + i;
            dt[i] = part == 0 && t < end ? p.dt.data[t * p.dt.stride + first_head + head] : 0;
        }
    }

    // What the block reads once: taps, weights, the tokens before the first.
    __device__ __forceinline__ void begin() const {
        for (int i = thread; i < width + slice; i += threads) {
            const int channel = i < width ? first_head * head_dim + i : bc_channel() + i - width;
            NVFP4_UNROLL
            for (int j = 0; j <= before; ++j) m.taps[j][i] = p.taps[channel * (before + 1) + j];
            m.taps[before + 1][i] = p.bias ? p.bias[channel] : 0.0f;
            NVFP4_UNROLL
            for (int j = 0; j < before; ++j) {
                u16& to = i < width ? m.x_in[j][i] : m.bc_in[j][i - width];
                to = p.conv_state ? p.conv_state[(i64(sequence) * channels + channel) * before + j] : 0;
            }
            if (i < width) m.norm_weight[i] = p.norm_weight[first_head * head_dim + i];
        }
    }

    // The convolution's last inputs, of which `left` are of the last chunk.
    __device__ __forceinline__ void keep(int left) const {
        for (int i = thread; i < width + slice; i += threads) {
            const int channel = i < width ? first_head * head_dim + i : bc_channel() + i - width;
            NVFP4_UNROLL
            for (int j = 0; j < before; ++j) {
                const u16 last = i < width ? m.x_in[left + j][i] : m.bc_in[left + j][i - width];
                p.conv_last[(i64(sequence) * channels + channel) * before + j] = last;
            }
        }
    }

    // By the head's first warp: steps and decays of the chunk's tokens, steps of 0 from `left` on.
    __device__ __forceinline__ void decays(int left) const {
        float step[2], a[2];
        const float rate = p.A[first_head + head] * log2e;
        NVFP4_UNROLL
        for (int i = 0; i < 2; ++i) {
            float v = real(U32x1(static_cast<u32>(dt[i]) << 16)).v + p.dt_bias[first_head + head];
            v = (v > 0.0f || v != v ? v : 0.0f) + log1pf(expf(-fabsf(v)));
            v = v < p.low ? p.low : v > p.high ? p.high : v;
            step[i] = 2 * lane + i < left ? v : 0.0f;
            a[i] = step[i] * rate;
        }
        float sum = a[0] + a[1];
        NVFP4_UNROLL
        for (int d = 1; d < 32; d *= 2) {
            const float other = __shfl_sync(all_lanes, sum, lane - d);
            if (lane >= d) sum += other;
        }
        const float prior = __shfl_sync(all_lanes, sum, lane - 1);
        a[0] += lane ? prior : 0.0f;
        a[1] += a[0];
        const float last = __shfl_sync(all_lanes, a[1], 31);
        NVFP4_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int t = 2 * lane + i;
            m.log_decay[head][t] = a[i];
            m.step[head][t] = step[i];
            m.from_start[head][t] = fast_exp2(a[i]);
            m.to_end[head][t] = fast_exp2(fminf(last - a[i], 0.0f)) * step[i];
        }
    }

    // silu of the convolution of two channels for `count` tokens; store(token, both in bf16). Beyond the sequence's end come
    // values that steps of 0 make nothing of.
    template <int count, int columns, class Store>
    __device__ __forceinline__ void convolve(
        const u16 (&in)[before + tokens][columns], int column, int tap, int first, Store store) const {
        Two weight[before + 1];
        const Two bias = two(&m.taps[before + 1][tap]);
        float seen[before + 1][2];
        NVFP4_UNROLL
        for (int j = 0; j <= before; ++j) weight[j] = two(&m.taps[j][tap]);
        const auto see = [&](int t, int to) { widen(*reinterpret_cast<const u32*>(&in[t][column]), seen[to]); };
        NVFP4_UNROLL
        for (int j = 0; j < before; ++j) see(first + j, j);
        constexpr int together = count < 4 ? count : 4;
        NVFP4_KEEP_LOOP
        for (int begin = first; begin < first + count; begin += together) {
            NVFP4_UNROLL
            for (int t = 0; t < together; ++t) {
                see(begin + t + before, (t + before) % 4);
                float x = bias.x, y = bias.y;
                NVFP4_UNROLL
                for (int j = 0; j <= before; ++j) {
                    x = fmaf(weight[j].x, seen[(t + j) % 4][0], x);
                    y = fmaf(weight[j].y, seen[(t + j) % 4][1], y);
                }
                store(begin + t, pack_bf16(x * logistic(x), y * logistic(y)));
            }
        }
    }

    __device__ __forceinline__ void convolve_x() const {
        // a lane's channels 2 u and the next of 16 go to word u / 2 of the first or, of odd u, the second piece
        const int piece = head * 8 + lane / 8 * 2 + lane % 2, word = lane % 8 / 2, column = head * head_dim + 2 * lane;
        convolve<tokens / 4>(m.x_in, column, column, part * (tokens / 4), [&](int t, u32 both) {
            reinterpret_cast<u32*>(m.x[t])[(piece ^ (t & 7)) * 4 + word] = both;
        });
    }

    // The block's slice of B or C, to all blocks: each warp convolves whole rows of it, and hands them on.
    __device__ __forceinline__ void convolve_bc() const {
        constexpr int pairs = slice / 2, count = tokens * pairs / threads, pieces = slice / 8, rows = count * 32 / pairs;
        u16(&to)[tokens][states] = rank < half ? m.B : m.C;
        const int pair = thread % pairs, word = rank % half * pairs + pair;
        convolve<count>(m.bc_in, 2 * pair, width + 2 * pair, thread / pairs * count, [&](int t, u32 both) {
            reinterpret_cast<u32*>(to[t])[(word / 4 ^ (t & 7)) * 4 + word % 4] = both;
        });
        __syncwarp();
        NVFP4_UNROLL
        for (int i = lane; i < rows * pieces; i += 32) {
            const int row = warp * rows + i / pieces, piece = rank % half * pieces + i % pieces;
            const Chunk* const made = reinterpret_cast<const Chunk*>(to[row]) + (piece ^ (row & 7));
            const Chunk value = *made;
            const u32 place = shared_address(made);
            NVFP4_KEEP_LOOP
            for (int other = 1; other < cluster; ++other) store_remote16(remote_address(place, rank ^ other), value);
        }
    }
};

}  // namespace nvfp4

// mixer_scan on GPUs from sm_90 on: convolution, scan, gate and norm in one pass, a cluster of blocks for a B/C group of a sequence.
//
// Four warps have a head; the state, 64 channels by 128, stays in their accumulators, 16 channels a warp, from the first token
// to the last. In a chunk of 64 tokens each block convolves x of its own heads and its share of the group's B and C, which it
// hands to the others through their shared memory; then y = C S decayed + (C B^T under decays) x + D x and the state's update, in
// mma.sync; then the gate, and sums of squares that the blocks exchange, added in the order of blocks: the norm.
//   S (a warp's 16 channels by 128 states) as accumulators is, packed to bf16, operand B of C S.
//   x, transposed as it is read, is operand B of the mixed scores and, times the decays to the chunk's end, A of the update.
// Channels of x lie in shared memory in an order that gives each lane four neighbours of y: stores of whole sectors.
// Barriers of the cluster, two a chunk: behind B and C, and behind the sums, which also frees B and C for the next chunk.
// The next chunk's x, B and C are fetched once this one's are convolved, its z once this one is gated: one buffer each.
#include "arch/ptx_cluster.cuh"
#include "launch.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

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
    float taps[before + 2][width + slice];  // the bias last
    float norm_weight[width];
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
struct Scan {
    using M = Memory<heads, cluster>;
    static constexpr int threads = 128 * heads, width = M::width, slice = M::slice, half = cluster / 2;
    using State = float[states / 8][4];  // tile n: rows g and g + 8 of the warp's channels, states 8 n + 2 q and the next
    using Y = float[4][2][4];            // tile (i, j): tokens 16 i + g and + 8, channels 4 q + 2 j and the next

    const MixerScanLaunch& p;
    M& m;
    const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), g = lane >> 2, q = lane & 3;
    const int head = warp_index() / 4, part = warp_index() % 4;  // of the block's heads; of the head's channels
    const int rank = static_cast<int>(blockIdx.x) % cluster;
    const i64 group = blockIdx.x / cluster % p.groups, sequence = blockIdx.x / cluster / p.groups;
    const i64 all_heads = p.groups * cluster * heads, first_head = (group * cluster + rank) * heads;
    const i64 channels = all_heads * head_dim + 2 * p.groups * states;
    const i64 bc_channel = all_heads * head_dim + (rank / half * p.groups + group) * states + rank % half * slice;
    i64 start, length, token;  // start: the sequence's first token, in all rows; token: the same in its row
    const u16 *x_from, *bc_from, *z_from, *dt_from;
    u16 dt[2];  // of the next chunk's tokens 2 lane and the one behind, in the head's first warp

    __device__ __forceinline__ Scan(const MixerScanLaunch& p, M& m) : p(p), m(m) {
        start = p.cu_seqlens ? p.cu_seqlens[sequence] : sequence * p.length;
        length = p.cu_seqlens ? p.cu_seqlens[sequence + 1] - start : p.length;
        const auto first = [&](const TokensLaunch& t) {
            return t.data + start / p.length * t.row_stride + start % p.length * t.token_stride;
        };
        x_from = first(p.xBC) + first_head * head_dim;
        bc_from = first(p.xBC) + bc_channel;
        z_from = first(p.z) + first_head * head_dim;
        dt_from = first(p.dt) + first_head + head;
    }

    // Rows of 16-byte pieces from `from`, where the chunk's first token is row `rows` - 64; zeros from the sequence's end on.
    template <int rows, int columns, bool exchanged>
    __device__ __forceinline__ void fetch(u16 (&to)[rows][columns], const u16* from, i64 stride, i64 chunk) const {
        constexpr int pieces = columns / 8;
        const i64 first = chunk * tokens - (rows - tokens);
        for (int i = thread; i < rows * pieces; i += threads) {
            const int row = i / pieces, piece = i % pieces;
            const i64 t = first + row;
            u16* const place = to[row] + (exchanged ? piece ^ (row & 7) : piece) * 8;
            if (t >= 0) copy_async16(place, from + t * stride + piece * 8, t < length ? 16 : 0);
        }
    }
    __device__ __forceinline__ void fetch_inputs(i64 chunk) const {
        if (chunk * tokens < length) {
            fetch<before + tokens, width, false>(m.x_in, x_from, p.xBC.token_stride, chunk);
            fetch<before + tokens, slice, false>(m.bc_in, bc_from, p.xBC.token_stride, chunk);
        }
        commit_copies();
    }
    __device__ __forceinline__ void fetch_z(i64 chunk) const {
        if (chunk * tokens < length) fetch<tokens, width, true>(m.z, z_from, p.z.token_stride, chunk);
        commit_copies();
    }
    __device__ __forceinline__ void fetch_dt(i64 chunk) {
        NVFP4_UNROLL
        for (int i = 0; i < 2; ++i) {
            const i64 t = chunk * tokens + 2 * lane + i;
            dt[i] = part == 0 && t < length ? dt_from[t * p.dt.token_stride] : 0;
        }
    }

    // What the block reads once: taps, weights, the tokens before the first.
    __device__ __forceinline__ void begin() const {
        for (int i = thread; i < width + slice; i += threads) {
            const i64 channel = i < width ? first_head * head_dim + i : bc_channel + i - width;
            NVFP4_UNROLL
            for (int j = 0; j <= before; ++j) m.taps[j][i] = p.taps[channel * (before + 1) + j];
            m.taps[before + 1][i] = p.bias ? p.bias[channel] : 0.0f;
            NVFP4_UNROLL
            for (int j = 0; j < before; ++j) {
                u16& to = i < width ? m.x_in[j][i] : m.bc_in[j][i - width];
                to = p.conv_state ? p.conv_state[(sequence * channels + channel) * before + j] : 0;
            }
            if (i < width) m.norm_weight[i] = p.norm_weight[first_head * head_dim + i];
        }
    }

    // The convolution's last inputs, of which `left` are of the last chunk.
    __device__ __forceinline__ void end(int left) const {
        for (int i = thread; i < width + slice; i += threads) {
            const i64 channel = i < width ? first_head * head_dim + i : bc_channel + i - width;
            NVFP4_UNROLL
            for (int j = 0; j < before; ++j) {
                const u16 last = i < width ? m.x_in[left + j][i] : m.bc_in[left + j][i - width];
                p.conv_last[(sequence * channels + channel) * before + j] = last;
            }
        }
    }

    // Where states 2 q and the next of tile n of row g, or with `upper` g + 8, are in memory.
    __device__ __forceinline__ i64 state_place(int n, int upper) const {
        const int channel = part * 16 + (g >> 1) * 4 + upper * 2 + (g & 1);
        return ((sequence * all_heads + first_head + head) * head_dim + channel) * states + n * 8 + q * 2;
    }

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

    // silu of the convolution of two channels for `count` tokens; store(token, both in bf16), zeros from `left` on.
    template <int count, int columns, class Store>
    __device__ __forceinline__ void convolve(
        const u16 (&in)[before + tokens][columns], int column, int tap, int first, int left, Store store) const {
        Two weight[before + 1];
        const Two bias = two(&m.taps[before + 1][tap]);
        float seen[before + 1][2];
        NVFP4_UNROLL
        for (int j = 0; j <= before; ++j) weight[j] = two(&m.taps[j][tap]);
        const auto see = [&](int t) { widen(*reinterpret_cast<const u32*>(&in[first + t][column]), seen[t & 3]); };
        NVFP4_UNROLL
        for (int j = 0; j < before; ++j) see(j);
        NVFP4_UNROLL
        for (int t = 0; t < count; ++t) {
            see(t + before);
            float x = bias.x, y = bias.y;
            NVFP4_UNROLL
            for (int j = 0; j <= before; ++j) {
                x = fmaf(weight[j].x, seen[(t + j) & 3][0], x);
                y = fmaf(weight[j].y, seen[(t + j) & 3][1], y);
            }
            store(first + t, first + t < left ? pack_bf16(x * logistic(x), y * logistic(y)) : 0u);
        }
    }

    __device__ __forceinline__ void convolve_x(int left) const {
        // a lane's channels 2 u and the next of 16 go to word u / 2 of the first or, of odd u, the second piece
        const int piece = head * 8 + lane / 8 * 2 + lane % 2, word = lane % 8 / 2, column = head * head_dim + 2 * lane;
        convolve<tokens / 4>(m.x_in, column, column, part * (tokens / 4), left, [&](int t, u32 both) {
            reinterpret_cast<u32*>(m.x[t])[(piece ^ (t & 7)) * 4 + word] = both;
        });
    }

    // The block's slice of B or C, to all blocks: each warp convolves whole rows of it, and hands them on.
    __device__ __forceinline__ void convolve_bc(int left) const {
        constexpr int pairs = slice / 2, count = tokens * pairs / threads, pieces = slice / 8, rows = count * 32 / pairs;
        u16(&to)[tokens][states] = rank < half ? m.B : m.C;
        const int pair = thread % pairs, word = rank % half * pairs + pair;
        convolve<count>(m.bc_in, 2 * pair, width + 2 * pair, thread / pairs * count, left, [&](int t, u32 both) {
            reinterpret_cast<u32*>(to[t])[(word / 4 ^ (t & 7)) * 4 + word % 4] = both;
        });
        __syncwarp();
        for (int i = lane; i < rows * pieces; i += 32) {
            const int row = warp_index() * rows + i / pieces, piece = rank % half * pieces + i % pieces;
            const Chunk* const made = reinterpret_cast<const Chunk*>(to[row]) + (piece ^ (row & 7));
            const Chunk value = *made;
            const u32 place = shared_address(made);
            NVFP4_UNROLL
            for (int other = 1; other < cluster; ++other) store_remote16(remote_address(place, (rank + other) % cluster), value);
        }
    }

    // Of 16 rows from `row` and two pieces from `piece`: the lane's, as load_matrices wants it.
    template <int columns>
    __device__ __forceinline__ const u16* tile(const u16 (&matrix)[tokens][columns], int row, int piece) const {
        return matrix[row + (lane & 15)] + ((piece + (lane >> 4)) ^ (lane & 7)) * 8;
    }
    static __device__ __forceinline__ int exchanged(int row, int piece) { return row * 16 + (piece ^ (row >> 2 & 1)) * 8; }

    // The head's scores under their decays, its four warps sharing the squares.
    __device__ __forceinline__ void mix() const {
        for (int square = 3 - part; square < squares_below; square += 4) {
            const int high = (square >= 1) + (square >= 3) + (square >= 6), low = square - high * (high + 1) / 2;
            float d[2][4] = {};
            NVFP4_UNROLL
            for (int k = 0; k < states / 16; ++k) {
                u32 c[4], b[4];
                load_matrices(c, tile(m.C, 16 * high, 2 * k));
                load_matrices(b, tile(m.B, 16 * low, 2 * k));
                multiply_bf16(d[0], c, b[0], b[2]);
                multiply_bf16(d[1], c, b[1], b[3]);
            }
            NVFP4_UNROLL
            for (int n = 0; n < 2; ++n) {
                const int from = 16 * low + 8 * n + 2 * q;
                const Two a = two(&m.log_decay[head][from]), step = two(&m.step[head][from]);
                NVFP4_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const int row = g + 8 * i, to = 16 * high + row;
                    const float here = m.log_decay[head][to];
                    const float x = from <= to ? d[n][2 * i] * (fast_exp2(fminf(here - a.x, 0.0f)) * step.x) : 0.0f;
                    const float y = from < to ? d[n][2 * i + 1] * (fast_exp2(fminf(here - a.y, 0.0f)) * step.y) : 0.0f;
                    *reinterpret_cast<u32*>(&m.scores[head][square][exchanged(row, n) + 2 * q]) = pack_bf16(x, y);
                }
            }
        }
    }

    // y = C S under the decays from the chunk's start.
    __device__ __forceinline__ void read_state(const State& s, Y& y) const {
        NVFP4_UNROLL
        for (int k = 0; k < states / 16; ++k) {
            u32 b[4];
            NVFP4_UNROLL
            for (int i = 0; i < 4; ++i) b[i] = pack_bf16(s[2 * k + (i & 1)][i & 2], s[2 * k + (i & 1)][(i & 2) + 1]);
            NVFP4_UNROLL
            for (int i = 0; i < 4; ++i) {
                u32 c[4];
                load_matrices(c, tile(m.C, 16 * i, 2 * k));
                multiply_bf16(y[i][0], c, b[0], b[1]);
                multiply_bf16(y[i][1], c, b[2], b[3]);
            }
        }
        NVFP4_UNROLL
        for (int i = 0; i < 4; ++i) {
            NVFP4_UNROLL
            for (int e = 0; e < 8; ++e) y[i][e >> 2][e & 3] *= m.from_start[head][16 * i + g + 8 * (e >> 1 & 1)];
        }
    }

    // y += scores x; S = decay S + (x under the decays to the chunk's end)^T B.
    __device__ __forceinline__ void advance(State& s, Y& y) const {
        const float decay = m.from_start[head][tokens - 1];
        NVFP4_UNROLL
        for (int n = 0; n < states / 8; ++n) {
            NVFP4_UNROLL
            for (int i = 0; i < 4; ++i) s[n][i] *= decay;
        }
        NVFP4_UNROLL
        for (int low = 0; low < 4; ++low) {
            u32 x[4];
            load_matrices_transposed(x, tile(m.x, 16 * low, head * 8 + part * 2));
            NVFP4_UNROLL
            for (int high = low; high < 4; ++high) {
                u32 a[4];
                load_matrices(a, &m.scores[head][high * (high + 1) / 2 + low][exchanged(lane & 15, lane >> 4)]);
                multiply_bf16(y[high][0], a, x[0], x[1]);
                multiply_bf16(y[high][1], a, x[2], x[3]);
            }
            const Two near = two(&m.to_end[head][16 * low + 2 * q]), far = two(&m.to_end[head][16 * low + 8 + 2 * q]);
            const u32 a[4] = {scaled(x[0], near), scaled(x[2], near), scaled(x[1], far), scaled(x[3], far)};
            NVFP4_UNROLL
            for (int n = 0; n < states / 16; ++n) {
                u32 b[4];
                load_matrices_transposed(b, tile(m.B, 16 * low, 2 * n));
                multiply_bf16(s[2 * n], a, b[0], b[1]);
                multiply_bf16(s[2 * n + 1], a, b[2], b[3]);
            }
        }
    }

    // y = (y + D x) silu(z), and the sums of its squares over the warp's channels.
    __device__ __forceinline__ void gate(Y& y) const {
        const float skip = p.D[first_head + head];
        NVFP4_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int row = 8 * i + g, piece = head * 8 + part * 2;
            float z[4], sum = 0.0f;
            const Words gates = *reinterpret_cast<const Words*>(m.z[row] + ((piece + q / 2) ^ g) * 8 + q % 2 * 4);
            widen(gates.x, z);
            widen(gates.y, z + 2);
            NVFP4_UNROLL
            for (int j = 0; j < 2; ++j) {
                float x[2];
                widen(reinterpret_cast<const u32*>(m.x[row])[((piece + j) ^ g) * 4 + q], x);
                NVFP4_UNROLL
                for (int e = 0; e < 2; ++e) {
                    float& v = y[i / 2][j][i % 2 * 2 + e];
                    v = fmaf(skip, x[e], v) * (z[2 * j + e] * logistic(z[2 * j + e]));
                    sum = fmaf(v, v, sum);
                }
            }
            sum += __shfl_xor_sync(all_lanes, sum, 1);
            sum += __shfl_xor_sync(all_lanes, sum, 2);
            if (q == 0) m.squares[warp_index()][row] = sum;
        }
    }

    // The block's sums of squares to every block of the cluster.
    __device__ __forceinline__ void send_sums() const {
        for (int i = thread; i < tokens * cluster; i += threads) {
            float sum = 0.0f;
            NVFP4_UNROLL
            for (int warp = 0; warp < 4 * heads; ++warp) sum += m.squares[warp][i % tokens];
            store_remote4(remote_address(shared_address(&m.sums[rank][i % tokens]), i / tokens), sum);
        }
    }

    __device__ __forceinline__ void store(const Y& y, i64 chunk, int left) const {
        float scale[2];  // of rows lane and lane + 32
        NVFP4_UNROLL
        for (int i = 0; i < 2; ++i) {
            float sum = 0.0f;
            NVFP4_UNROLL
            for (int block = 0; block < cluster; ++block) sum += m.sums[block][lane + 32 * i];
            scale[i] = fast_rsqrt(sum * (1.0f / (width * cluster)) + p.eps);
        }
        const int channel = part * 16 + 4 * q;
        const float4 weight = *reinterpret_cast<const float4*>(m.norm_weight + head * head_dim + channel);
        u16* const to = p.y + ((start + chunk * tokens) * all_heads + first_head + head) * head_dim + channel;
        NVFP4_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int row = 8 * i + g;
            const float by = __shfl_sync(all_lanes, scale[i / 4], row % 32);
            const float* low = y[i / 2][0] + i % 2 * 2;
            const float* high = y[i / 2][1] + i % 2 * 2;
            const Words out = {pack_bf16(low[0] * by * weight.x, low[1] * by * weight.y),
                               pack_bf16(high[0] * by * weight.z, high[1] * by * weight.w)};
            if (row < left) *reinterpret_cast<Words*>(to + row * all_heads * head_dim) = out;
        }
    }

    __device__ __forceinline__ void run() {
        State s;
        NVFP4_UNROLL
        for (int i = 0; i < states / 4; ++i) {
            Two v = {0.0f, 0.0f};
            if (p.initial_state) v = two(p.initial_state + state_place(i / 2, i % 2));
            s[i / 2][i % 2 * 2] = v.x, s[i / 2][i % 2 * 2 + 1] = v.y;
        }
        begin();
        fetch_inputs(0);
        fetch_z(0);
        fetch_dt(0);
        cluster_arrive();
        cluster_wait();
        int left = 0;
        for (i64 chunk = 0; chunk * tokens < length; ++chunk) {
            left = length - chunk * tokens < tokens ? static_cast<int>(length - chunk * tokens) : tokens;
            wait_copies<1>();  // all but z
            __syncthreads();
            if (part == 0) decays(left);
            fetch_dt(chunk + 1);
            convolve_x(left);
            convolve_bc(left);
            cluster_arrive();
            cluster_wait();
            fetch_inputs(chunk + 1);
            mix();
            Y y = {};
            read_state(s, y);
            wait_copies<1>();  // all but the next chunk's inputs
            __syncthreads();
            advance(s, y);
            gate(y);
            __syncthreads();
            send_sums();
            cluster_arrive();
            cluster_wait();
            fetch_z(chunk + 1);
            store(y, chunk, left);
        }
        wait_copies<0>();
        end(left);
        NVFP4_UNROLL
        for (int i = 0; i < states / 4; ++i) {
            *reinterpret_cast<Two*>(p.last + state_place(i / 2, i % 2)) = {s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]};
        }
    }
};

template <int heads, int cluster>
static __device__ __forceinline__ void scan(const MixerScanLaunch& p) {
    NVFP4_DYNAMIC_SHARED(memory);
    Scan<heads, cluster>(p, *reinterpret_cast<Memory<heads, cluster>*>(memory)).run();
}

// By the heads of a block and the blocks of a cluster.
NVFP4_CLUSTER_KERNEL(mixer_scan_1x8, 128, 3, 8, MixerScanLaunch) { scan<1, 8>(p); }
NVFP4_CLUSTER_KERNEL(mixer_scan_2x4, 256, 2, 4, MixerScanLaunch) { scan<2, 4>(p); }
NVFP4_CLUSTER_KERNEL(mixer_scan_2x8, 256, 2, 8, MixerScanLaunch) { scan<2, 8>(p); }
NVFP4_CLUSTER_KERNEL(mixer_scan_4x8, 512, 1, 8, MixerScanLaunch) { scan<4, 8>(p); }

}  // namespace nvfp4

#endif

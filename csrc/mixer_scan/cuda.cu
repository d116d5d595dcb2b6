// mixer_scan on GPUs from sm_90 on: convolution, scan, gate and norm in one pass, a cluster of blocks for each B/C group of a
// sequence.
//
// Four warps have a head; the state, 64 channels by 128, stays in their accumulators, 16 channels a warp, from the first token
// to the last. In a chunk of 64 tokens each block convolves x of its own heads and its share of the group's B and C, which it
// hands to the others through their shared memory; then y = C S decayed + (C B^T under decays) x + D x and the state's update,
// in mma.sync; then the gate, and sums of squares that the blocks exchange, added in the order of blocks: the norm.
//   S (a warp's 16 channels by 128 states) as accumulators is, packed to bf16, operand B of C S.
//   x, transposed as it is read, is operand B of the scores' product and, times the decays to the chunk's end, A of the update.
// Channels of x lie in shared memory in an order that gives each lane four neighbours of y: stores of whole sectors.
// Barriers of the cluster, two a chunk: behind B and C, and behind the sums, which also frees B and C for the next chunk.
// The next chunk's x, B and C are fetched once this one's are convolved, its z once this one is gated: one buffer each.
//
// Bytes a token at Nano's sizes, bf16: 28,800 (xBC, z, dt, y), of 57,000 by conv_scan and 32,800 by the norm in Triton.
// For 64 tokens of a head an H200's memory takes 1,550 clocks of a multiprocessor for them, and 4,830 for what Triton moves. On
// sm_90 a warp issues 2,940 instructions for a chunk, four warps on four schedulers: 2,940 clocks, so that instructions are
// the limit here: convolutions 670, scores 430, C S and scores x 310, the update 240, gate and sums 570, norm 250.
// A block hands 8 KB (Nano) or 4 KB (Super) of B and C to each of 3 or 7 others: 24 or 28 KB a chunk of its two heads.
// No figure here has been measured.
#include "inputs.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace nvfp4 {

template <int heads, int cluster>
struct Scan : Inputs<heads, cluster> {
    using In = Inputs<heads, cluster>;
    using In::all_heads, In::first_head, In::rank, In::sequence, In::width, In::threads, In::token, In::end;
    using In::p, In::m, In::thread, In::warp, In::lane, In::g, In::q, In::head, In::part;
    using In::In;
    using State = float[states / 8][4];  // tile n: rows g and g + 8 of the warp's channels, states 8 n + 2 q and the next
    using Y = float[4][2][4];            // tile (i, j): tokens 16 i + g and + 8, channels 4 q + 2 j and the next

    // Where states 2 q and the next of tile n of row g, or with `upper` g + 8, are in memory.
    __device__ __forceinline__ i64 state_place(int n, int upper) const {
        const int channel = part * 16 + (g >> 1) * 4 + upper * 2 + (g & 1);
        return ((i64(sequence) * all_heads + first_head + head) * head_dim + channel) * states + n * 8 + q * 2;
    }

    // Of 16 rows from `row` and two pieces from `piece`: the lane's, as load_matrices wants it, to find the rows 8 apart in
    // neighbouring registers, or the pieces, as a product wants its right operand.
    template <int columns>
    __device__ __forceinline__ const u16* rows_first(const u16 (&matrix)[tokens][columns], int row, int piece) const {
        return matrix[row + (lane & 15)] + piece / 8 * 64 + ((piece % 8 + (lane >> 4)) ^ (lane & 7)) * 8;
    }
    template <int columns>
    __device__ __forceinline__ const u16* pieces_first(const u16 (&matrix)[tokens][columns], int row, int piece) const {
        const int second = lane >> 3 & 1;
        return matrix[row + (lane & 7) + (lane >> 4) * 8] + piece / 8 * 64 + ((piece % 8 + second) ^ (lane & 7)) * 8;
    }
    static __device__ __forceinline__ int exchanged(int row, int piece) { return row * 16 + (piece ^ (row >> 2 & 1)) * 8; }

    // The head's scores under their decays, its four warps sharing the squares.
    __device__ __forceinline__ void mix() {
        for (int square = 3 - part; square < squares_below; square += 4) {
            In::find_place();
            const int high = (square >= 1) + (square >= 3) + (square >= 6), low = square - high * (high + 1) / 2;
            float d[2][4] = {};
            NVFP4_UNROLL
            for (int k = 0; k < states / 16; ++k) {
                u32 c[4], b[4];
                load_matrices(c, rows_first(m.C, 16 * high, 2 * k));
                load_matrices(b, pieces_first(m.B, 16 * low, 2 * k));
                multiply_bf16(d[0], c, b[0], b[1]);
                multiply_bf16(d[1], c, b[2], b[3]);
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
                load_matrices(c, rows_first(m.C, 16 * i, 2 * k));
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

    // y += scores x.
    __device__ __forceinline__ void read_chunk(Y& y) const {
        NVFP4_UNROLL
        for (int low = 0; low < 4; ++low) {
            u32 x[4];
            load_matrices_transposed(x, rows_first(m.x, 16 * low, head * 8 + part * 2));
            NVFP4_UNROLL
            for (int high = low; high < 4; ++high) {
                u32 a[4];
                load_matrices(a, &m.scores[head][high * (high + 1) / 2 + low][exchanged(lane & 15, lane >> 4)]);
                multiply_bf16(y[high][0], a, x[0], x[1]);
                multiply_bf16(y[high][1], a, x[2], x[3]);
            }
        }
    }

    // S = decay S + (x under the decays to the chunk's end)^T B.
    __device__ __forceinline__ void advance(State& s) const {
        const float decay = m.from_start[head][tokens - 1];
        NVFP4_UNROLL
        for (int n = 0; n < states / 8; ++n) {
            NVFP4_UNROLL
            for (int i = 0; i < 4; ++i) s[n][i] *= decay;
        }
        NVFP4_KEEP_LOOP
        for (int t = 0; t < tokens; t += 16) {
            u32 x[4];
            load_matrices_transposed(x, rows_first(m.x, t, head * 8 + part * 2));
            const Two near = two(&m.to_end[head][t + 2 * q]), far = two(&m.to_end[head][t + 8 + 2 * q]);
            const u32 a[4] = {scaled(x[0], near), scaled(x[2], near), scaled(x[1], far), scaled(x[3], far)};
            NVFP4_UNROLL
            for (int n = 0; n < states / 16; ++n) {
                u32 b[4];
                load_matrices_transposed(b, rows_first(m.B, t, 2 * n));
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
            if (q == 0) m.squares[warp][row] = sum;
        }
    }

    // The block's sums of squares to every block of the cluster.
    __device__ __forceinline__ void send_sums() const {
        NVFP4_UNROLL
        for (int n = 0; n < tokens * cluster / threads; ++n) {
            const int i = n * threads + thread;
            float sum = 0.0f;
            NVFP4_UNROLL
            for (int of = 0; of < 4 * heads; ++of) sum += m.squares[of][i % tokens];
            store_remote4(remote_address(shared_address(&m.sums[rank][i % tokens]), i / tokens), sum);
        }
    }

    __device__ __forceinline__ void store(const Y& y, int left) const {
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
        u16* const to = p.y + (i64(token) * all_heads + first_head + head) * head_dim + channel;
        NVFP4_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int row = 8 * i + g;
            const float by = __shfl_sync(all_lanes, scale[i / 4], row % 32);
            const float* low = y[i / 2][0] + i % 2 * 2;
            const float* high = y[i / 2][1] + i % 2 * 2;
            const u32 words[2] = {pack_bf16(low[0] * by * weight.x, low[1] * by * weight.y),
                                  pack_bf16(high[0] * by * weight.z, high[1] * by * weight.w)};
            if (row < left) *reinterpret_cast<u64*>(to + row * all_heads * head_dim) = words[0] | u64(words[1]) << 32;
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
        In::begin();
        In::fetch_inputs(token, true);
        In::fetch_z(token);
        In::fetch_dt(token);
        cluster_arrive();
        cluster_wait();
        int left = 0;
        for (; token < end; token += tokens) {
            left = end - token < tokens ? end - token : tokens;
            In::find_place();
            wait_copies<1>();  // all but z
            __syncthreads();
            if (part == 0) In::decays(left);
            In::convolve_x();
            In::convolve_bc();
            cluster_arrive();
            cluster_wait();
            In::fetch_inputs(token + tokens, false);
            mix();
            Y y = {};
            read_state(s, y);
            wait_copies<1>();  // all but the next chunk's inputs
            __syncthreads();
            read_chunk(y);
            advance(s);
            gate(y);
            In::fetch_dt(token + tokens);
            __syncthreads();
            send_sums();
            cluster_arrive();
            cluster_wait();
            In::find_place();
            In::fetch_z(token + tokens);
            store(y, left);
        }
        In::find_place();
        wait_copies<0>();
        In::keep(left);
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
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 1200  // 99 KB of shared memory
NVFP4_CLUSTER_KERNEL(mixer_scan_1x8, 128, 1, 8, MixerScanLaunch) { scan<1, 8>(p); }
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1200  // 227 KB
NVFP4_CLUSTER_KERNEL(mixer_scan_2x4, 256, 2, 4, MixerScanLaunch) { scan<2, 4>(p); }
NVFP4_CLUSTER_KERNEL(mixer_scan_2x8, 256, 2, 8, MixerScanLaunch) { scan<2, 8>(p); }
NVFP4_CLUSTER_KERNEL(mixer_scan_4x8, 512, 1, 8, MixerScanLaunch) { scan<4, 8>(p); }
#endif

}  // namespace nvfp4

#endif

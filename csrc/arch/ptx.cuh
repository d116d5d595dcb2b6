// Every line of inline PTX, each with the section of the PTX ISA that defines it and, beside it, its model on the CPU.
#pragma once
#include "numerics/lane.h"

// Whether code is for one chip (target sm_100a), or for its family (sm_120f) or one chip. Compilers before 12.9 name the chip
// alone, those whose target they know.
#if defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL)
#define NVFP4_OF_CHIP
#endif
#if defined(NVFP4_OF_CHIP) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#define NVFP4_OF_FAMILY
#endif

namespace nvfp4 {

#if defined(__CUDACC__)

// Addresses of shared memory as instructions take them (PTX ISA, cvta).
static __device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// The compiler may not compute x anew where it is used, nor, in a loop, what follows from x before it.
static __device__ __forceinline__ void keep_in_register(u32& x) { asm volatile("" : "+r"(x)); }

// 16 bytes from global to shared memory, the first `bytes` of them read, the others zero; past the L1 cache
// (PTX ISA, cp.async).
static __device__ __forceinline__ void copy_async16(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
// The copies of this thread since the last commit become a group (PTX ISA, cp.async.commit_group).
static __device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `left` of this thread's groups are on their way (PTX ISA, cp.async.wait_group).
template <int left>
static __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// d += a b, a 16x16 and b 16x8 bf16, d fp32 (PTX ISA, mma.sync.aligned.m16n8k16, "Matrix Fragments for mma.m16n8k16 with
// floating point type"): of lane 4 g + q, a[0] row g, a[1] row g + 8, columns 2q, 2q + 1, a[2], a[3] the same 8 columns on;
// b[0] rows 2q, 2q + 1 of column g, b[1] 8 rows on; d[0], d[1] row g, columns 2q, 2q + 1, d[2], d[3] row g + 8.
static __device__ __forceinline__ void multiply_bf16(float* d, const u32* a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows of 16 bytes: lane 8 m + i says where row i of matrix m lies; lane 4 g + q gets bytes 4q to 4q + 3 of
// row g of each (PTX ISA, ldmatrix).
static __device__ __forceinline__ void load_matrices(u32* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}
// The same with each matrix transposed: lane 4 g + q gets element g of rows 2q and 2q + 1 (PTX ISA, ldmatrix, .trans).
static __device__ __forceinline__ void load_matrices_transposed(u32* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}

// Both halves a b in bf16, rounded to nearest, subnormals kept: a fused multiply-add of -0, since sm_80 has no product of
// its own (PTX ISA, fma; half precision). `high`: b's upper half for both, else its lower.
template <bool high>
static __device__ __forceinline__ u32 scaled_bf16x2(u32 a, u32 b) {
    u32 d;
    if (high) {
        asm("{ .reg .b16 l, h; .reg .b32 s; mov.b32 {l, h}, %2; mov.b32 s, {h, h}; fma.rn.bf16x2 %0, %1, s, %3; }"
            : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    } else {
        asm("{ .reg .b16 l, h; .reg .b32 s; mov.b32 {l, h}, %2; mov.b32 s, {l, l}; fma.rn.bf16x2 %0, %1, s, %3; }"
            : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    }
    return d;
}

// Exact (PTX ISA, cvt), and to nearest, ties to even, beyond the range Inf.
static __device__ __forceinline__ float fp16_to_fp32(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
static __device__ __forceinline__ u16 fp32_to_fp16(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Both to bf16, to nearest, ties to even; `low` in the lower half (PTX ISA, cvt: the second operand goes there).
static __device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// 2^x, 1 / x and 1 / sqrt(x) to 2^-22 of the result or so, what is subnormal 0 (PTX ISA, ex2, rcp, rsqrt; approx.ftz).
static __device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
static __device__ __forceinline__ float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
static __device__ __forceinline__ float fast_rsqrt(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes of global memory that nobody reads again (PTX ISA, ld.global.nc with level::eviction_priority).
static __device__ __forceinline__ void load_once16(const void* p, u32* v) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(p));
}

// The largest of all lanes' numbers, which all come to it (PTX ISA, redux.sync).
static __device__ __forceinline__ u32 warp_largest(u32 x) {
    u32 most;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(x));
    return most;
}

// 16 bytes of global memory that nobody writes meanwhile, or zeros (PTX ISA, ld.global.nc).
static __device__ __forceinline__ void load16_if(bool there, const void* p, u32* v) {
    asm volatile("{ .reg .pred there; setp.ne.u32 there, %5, 0;\n"
                 "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
                 "@there ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4]; }"
                 : "=&r"(v[0]), "=&r"(v[1]), "=&r"(v[2]), "=&r"(v[3]) : "l"(p), "r"(static_cast<u32>(there)));
}

// 16 bytes that other blocks will read, after a fence here and one there (__threadfence).
static __device__ __forceinline__ void store_for_others16(float* p, const float* v) {
    *reinterpret_cast<float4*>(p) = {v[0], v[1], v[2], v[3]};
}
// 16 bytes that other blocks have written: from the L2 cache, past an L1 that may be out of date (PTX ISA, ld, .cg).
static __device__ __forceinline__ void load_from_others16(const float* p, float* v) {
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "l"(p) : "memory");
}

#else  // the model

static inline void keep_in_register(u32&) {}
static inline u32 shared_address(const void* p) { return host_model::shared_address(p); }
static inline void copy_async16(void* to, const void* from, int bytes) { host_model::copy_async(to, from, 16, bytes); }
static inline void commit_copies() { host_model::commit_copies(); }
template <int left>
static inline void wait_copies() {
    host_model::wait_copies(left);
}

// What products spend their time with: inlined, where the model is compiled to be read.
__attribute__((always_inline)) static inline float bf16_half(u32 word, int half) {
    const u32 x = half ? word & 0xFFFF0000u : word << 16;
    float value;
    std::memcpy(&value, &x, sizeof value);
    return value;
}

__attribute__((optimize("O3"))) static inline void multiply_bf16(float* d, const u32* a, u32 b0, u32 b1) {
    const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const auto* all = host_model::exchange("mma.sync.m16n8k16", mine, sizeof mine);
    const int g = host_model::lane() / 4, q = host_model::lane() % 4;
    float left[2][16], right[2][16];  // rows g and g + 8, columns 2 q and 2 q + 1
    for (int word = 0; word < 8; ++word) {  // of two k; k 0..7 lies in the first registers, 8..15 in the second
        u32 rows[4], columns[2][2];
        std::memcpy(rows, all[g * 4 + word % 4], sizeof rows);
        for (int i = 0; i < 2; ++i) std::memcpy(columns[i], all[(2 * q + i) * 4 + word % 4] + 16, sizeof columns[i]);
        for (int i = 0; i < 2; ++i) {
            for (int half = 0; half < 2; ++half) {
                left[i][2 * word + half] = bf16_half(rows[i + word / 4 * 2], half);
                right[i][2 * word + half] = bf16_half(columns[i][word / 4], half);
            }
        }
    }
    for (int i = 0; i < 4; ++i) {
        double sum = d[i];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(left[i / 2][k]) * right[i % 2][k];
        d[i] = static_cast<float>(sum);
    }
}

// take(m, i, row): row i of matrix m. Two rows of a matrix in the same banks fail too: no kernel here means to pay for that.
template <class Take>
static inline void each_row(const char* operation, const void* row, Take take) {
    const auto* all = host_model::exchange(operation, &row, sizeof row);
    for (int m = 0; m < 4; ++m) {
        size_t places = 0;
        for (int i = 0; i < 8; ++i) {
            const unsigned char* from;
            std::memcpy(&from, all[8 * m + i], sizeof from);
            if (reinterpret_cast<size_t>(from) % 16) host_model::fail("ldmatrix: an address is no multiple of 16");
            places |= size_t(1) << reinterpret_cast<size_t>(from) / 16 % 8;
            take(m, i, from);
        }
        if (places != 0xFF) host_model::fail("ldmatrix: a bank conflict");
    }
}
static inline void load_matrices(u32* r, const void* row) {
    const int g = host_model::lane() / 4, q = host_model::lane() % 4;
    each_row("ldmatrix", row, [&](int m, int i, const unsigned char* from) {
        if (i == g) std::memcpy(r + m, from + 4 * q, 4);
    });
}
static inline void load_matrices_transposed(u32* r, const void* row) {
    const int g = host_model::lane() / 4, q = host_model::lane() % 4;
    each_row("ldmatrix.trans", row, [&](int m, int i, const unsigned char* from) {
        if (i / 2 == q) std::memcpy(reinterpret_cast<u16*>(r + m) + i % 2, from + 2 * g, 2);
    });
}

static inline u32 narrow_bf16(float x) {
    const u32 b = bits(F32x1(x)).v;
    return (b & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFu : (b + 0x7FFFu + (b >> 16 & 1u)) >> 16;
}
static inline u32 pack_bf16(float low, float high) { return narrow_bf16(low) | narrow_bf16(high) << 16; }

static inline float no_subnormal(float x) { return std::fabs(x) < 1.17549435e-38f ? 0.0f : x; }
static inline float fast_exp2(float x) { return no_subnormal(std::exp2(x)); }
static inline float fast_reciprocal(float x) { return no_subnormal(1.0f / x); }
static inline float fast_rsqrt(float x) { return 1.0f / std::sqrt(x); }

template <bool high>
static inline u32 scaled_bf16x2(u32 a, u32 b) {
    u32 halves[2];
    for (int i = 0; i < 2; ++i) {
        const u32 x = bits(F32x1(bf16_half(a, i) * bf16_half(b, high))).v;  // two 8-bit significands: exact in fp32
        halves[i] = (x + 0x7FFFu + (x >> 16 & 1u)) >> 16;
    }
    return halves[0] | halves[1] << 16;
}

static inline float fp16_to_fp32(u16 x) {
    const u32 sign = (x & 0x8000u) << 16, m = x & 0x7FFFu;
    const float magnitude = m >= 0x7C00u ? real(U32x1(m << 13 | 0x70000000u)).v : std::ldexp(real(U32x1(m << 13)).v, 112);
    return real(U32x1(bits(F32x1(magnitude)).v | sign)).v;
}
static inline u16 fp32_to_fp16(float x) {
    const u32 b = bits(F32x1(x)).v, sign = b >> 16 & 0x8000u, m = b & 0x7FFFFFFFu;
    if (m > 0x7F800000u) return 0x7FFFu;
    if (m >= 0x477FF000u) return static_cast<u16>(sign | 0x7C00u);
    if (m < 0x38800000u) return static_cast<u16>(sign | static_cast<u32>(std::nearbyint(std::ldexp(real(U32x1(m)).v, 24))));
    return static_cast<u16>(sign | ((m + 0xFFFu + (m >> 13 & 1u) - 0x38000000u) >> 13));
}

static inline void load_once16(const void* p, u32* v) { std::memcpy(v, p, 16); }
static inline u32 warp_largest(u32 x) {
    const auto* all = host_model::exchange("redux.sync", &x, sizeof x);
    for (int i = 0; i < 32; ++i) {
        u32 other;
        std::memcpy(&other, all[i], sizeof other);
        x = other > x ? other : x;
    }
    return x;
}
static inline void load16_if(bool there, const void* p, u32* v) {
    if (there) std::memcpy(v, p, 16);
    else v[0] = v[1] = v[2] = v[3] = 0;
}
static inline void store_for_others16(float* p, const float* v) {
    host_model::stored_for_others(p);
    std::memcpy(p, v, 16);
}
static inline void load_from_others16(const float* p, float* v) {
    host_model::loads_from_others(p);
    std::memcpy(v, p, 16);
}

#endif

}  // namespace nvfp4

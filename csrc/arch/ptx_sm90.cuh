// The instructions of Hopper's warpgroups (sm_90a), each with the section of the PTX ISA that defines it, and their model on
// the CPU (host_model.h). A warpgroup is four warps, the first a multiple of four.
//
// In the model a product reads B from shared memory twice, where the bits of its descriptor say: when it is issued and when
// its group is waited for. The two must agree; so must A's registers. Until the wait the sums are spoilt, and must stay as
// they are. Groups must begin with a fence, and copies that products read must have been shown to the tensor cores.
#pragma once
#include "arch/kernel.cuh"

namespace nvfp4 {

constexpr int product_tokens = 128;  // columns of a product, 64 rows high and 16 deep

// Where a product finds B in shared memory: rows (columns of the product) of 128 bytes, eight to 1,024, whose 16-byte chunks
// are exchanged by the row's number modulo 8; the first eight begin at a multiple of 1,024 (PTX ISA, wgmma, "Matrix
// Descriptor Format", "Strides": swizzle mode 1, 128 bytes; stride 1,024; K-major, for which the leading stride means nothing).
static __device__ __forceinline__ u64 swizzled_rows(u32 address) {
    return (address & 0x3FFFFu) >> 4 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

#if defined(__CUDACC__)

// What this thread has written to shared memory, its copies too, may be read by tensor cores after the next barrier
// (PTX ISA, membar, fence.proxy.async).
static __device__ __forceinline__ void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// If `wanted`: four bytes from global memory to an address of shared memory, or zeros unless `inside` (PTX ISA, cp.async, ignore-src).
static __device__ __forceinline__ void copy_async4(u32 to, const void* from, bool wanted, bool inside) {
    asm volatile(
        "{ .reg .pred p, q; setp.eq.b32 p, %3, 0; setp.ne.b32 q, %2, 0;\n"
        "@q cp.async.ca.shared.global.L2::128B [%0], [%1], 4, p; }" ::"r"(to), "l"(from),
        "r"(static_cast<int>(wanted)), "r"(static_cast<int>(inside))
        : "memory");
}

// Registers written so far may be read by products (PTX ISA, wgmma.fence).
static __device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last commit become a group (PTX ISA, wgmma.commit_group).
static __device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `left` groups are on their way (PTX ISA, wgmma.wait_group).
template <int left>
static __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
// After the wait for the last product: the compiler may not have read a sum before.
static __device__ __forceinline__ void settle(float (&d)[64]) {
    NVFP4_UNROLL
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define NVFP4_SUMS8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

// d = a b, added to d if `add`: a 64x16 bf16 in registers, b 16x128 bf16 in shared memory, d fp32 (PTX ISA, wgmma.mma_async;
// "Register Fragments for wgmma.mma_async.m64k16": warp w has rows 16 w to 16 w + 15, a of them as in mma.m16n8k16, d[4 n + i]
// as d[i] of that instruction for columns 8 n to 8 n + 7).
static __device__ __forceinline__ void multiply_async(float (&d)[64], const u32 (&a)[4], u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "{%64,%65,%66,%67}, %68, p, 1, 1, 0; }"
        : NVFP4_SUMS8(d, 0), NVFP4_SUMS8(d, 8), NVFP4_SUMS8(d, 16), NVFP4_SUMS8(d, 24), NVFP4_SUMS8(d, 32), NVFP4_SUMS8(d, 40),
          NVFP4_SUMS8(d, 48), NVFP4_SUMS8(d, 56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}
#undef NVFP4_SUMS8

#else  // the model

static inline void show_to_tensor_cores() { host_model::show_copies(); }
static inline void copy_async4(u32 to, const void* from, bool wanted, bool inside) {
    auto* memory = static_cast<unsigned char*>(host_model::dynamic_shared());
    if (wanted) host_model::copy_async(memory + (to - shared_address(memory)), from, 4, inside ? 4 : 0);
}

namespace hopper_model {

constexpr u32 columns = product_tokens / 4;  // of a lane
using Columns = Chunk[columns][2];           // their 16 values of k
constexpr u32 spoilt = 0x7FA5A5A5u;          // a NaN that no product makes

struct Product {
    float* d;
    const u32* a;
    u32 mine[4], rows[4][4];  // a as issued: this lane's, and that of the four lanes that share its rows
    u64 b;
    bool add;
    Columns right;
};
struct Sums {  // behind spoilt registers
    float* d;
    float values[64];
    int products;
};
struct Products final : host_model::Pending {
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;
    std::vector<Sums> sums;
    bool fenced = false;
    bool done() const override { return open.empty() && groups.empty(); }
};

static inline Products& products() {
    auto& kept = host_model::pending();
    if (!kept) kept.reset(new Products);
    return static_cast<Products&>(*kept);
}

__attribute__((optimize("O3"))) static inline void read_columns(u64 b, Columns& to) {
    if (b >> 62 != 1 || (b >> 49 & 7)) host_model::fail("wgmma: a descriptor of other than 128-byte swizzle without offset");
    const u32 start = static_cast<u32>(b & 0x3FFFu) << 4, apart = static_cast<u32>(b >> 32 & 0x3FFFu) << 4;
    const auto* memory = static_cast<const unsigned char*>(host_model::dynamic_shared());
    const u32 first = shared_address(memory), lane = static_cast<u32>(host_model::lane());
    for (u32 i = 0; i < columns; ++i) {
        const u32 row = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
        for (u32 chunk = 0; chunk < 2; ++chunk) {
            const u32 at = start + row / 8 * apart + row % 8 * 128 + chunk * 16;
            to[i][chunk] = *reinterpret_cast<const Chunk*>(memory + ((at ^ (at >> 7 & 7) << 4) - first));
        }
    }
}

static inline bool still_spoilt(const float* d) {
    for (int i = 0; i < 64; ++i) {
        if (bits(F32x1(d[i])).v != spoilt) return false;
    }
    return true;
}

__attribute__((optimize("O3"))) static inline void add_product(const Product& p, float* d) {
    float left[2][16], right[16];
    for (int k = 0; k < 16; ++k) {  // k 0..7 lies in the first registers, 8..15 in the others; row 8 in the odd ones
        for (int row = 0; row < 2; ++row) left[row][k] = bf16_half(p.rows[k % 8 / 2][row + k / 8 * 2], k % 2);
    }
    for (u32 i = 0; i < columns; ++i) {
        const u32* words = &p.right[i][0].x;
        for (int k = 0; k < 16; ++k) right[k] = bf16_half(words[k / 2], k % 2);
        for (int row = 0; row < 2; ++row) {
            float& to = d[i / 2 * 4 + row * 2 + i % 2];
            double sum = p.add ? to : 0.0;
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(left[row][k]) * right[k];
            to = static_cast<float>(sum);
        }
    }
}

static inline void finish(Products& all, const Product& p) {
    Columns now;
    read_columns(p.b, now);
    if (std::memcmp(now, p.right, sizeof now) != 0) host_model::fail("wgmma: B has changed before the product was waited for");
    if (std::memcmp(p.a, p.mine, 16) != 0) host_model::fail("wgmma: A has changed before the product was waited for");
    for (size_t i = 0; i < all.sums.size(); ++i) {
        Sums& s = all.sums[i];
        if (s.d != p.d) continue;
        add_product(p, s.values);
        if (--s.products) return;
        if (!still_spoilt(p.d)) host_model::fail("wgmma: sums have changed before the product was waited for");
        std::memcpy(p.d, s.values, sizeof s.values);
        all.sums.erase(all.sums.begin() + static_cast<long>(i));
        return;
    }
}

}  // namespace hopper_model

static inline void fence_registers() {
    host_model::exchange("wgmma.fence", "", 1);
    hopper_model::products().fenced = true;
}

static inline void multiply_async(float (&d)[64], const u32 (&a)[4], u64 b, bool add) {
    using namespace hopper_model;
    struct Given {
        u32 a[4];
        u64 b;
        u64 add;
    } given = {{a[0], a[1], a[2], a[3]}, b, add};
    const auto* all = host_model::exchange("wgmma.mma_async", &given, sizeof given);
    Products& mine = products();
    mine.open.reserve(8);  // of a kilobyte each
    if (!mine.fenced) host_model::fail("wgmma: no fence since the last group");
    if (!host_model::copies_shown()) host_model::fail("wgmma: copies that no fence has shown to the tensor cores");
    Product p;
    p.d = d, p.a = a, p.b = b, p.add = add;
    std::memcpy(p.mine, a, 16);
    for (int i = 0; i < 4; ++i) {
        Given other;
        std::memcpy(&other, all[host_model::lane() / 4 * 4 + i], sizeof other);
        if (other.b != b || other.add != given.add) host_model::fail("wgmma: lanes with different operands");
        std::memcpy(p.rows[i], other.a, 16);
    }
    read_columns(b, p.right);
    mine.open.push_back(p);
    for (Sums& s : mine.sums) {
        if (s.d != d) continue;
        if (!still_spoilt(d)) host_model::fail("wgmma: sums have changed before the product was waited for");
        ++s.products;
        return;
    }
    mine.sums.push_back({d, {}, 1});
    std::memcpy(mine.sums.back().values, d, sizeof(float) * 64);
    for (float& value : d) value = real(U32x1(spoilt)).v;
}

static inline void commit_products() {
    host_model::exchange("wgmma.commit_group", "", 1);
    auto& mine = hopper_model::products();
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
    mine.fenced = false;
}

template <int left>
static inline void wait_products() {
    host_model::exchange("wgmma.wait_group", "", 1);
    auto& mine = hopper_model::products();
    while (mine.groups.size() > static_cast<size_t>(left)) {
        for (const auto& product : mine.groups.front()) hopper_model::finish(mine, product);
        mine.groups.erase(mine.groups.begin());
    }
}

static inline void settle(float (&)[64]) {}

#endif

}  // namespace nvfp4

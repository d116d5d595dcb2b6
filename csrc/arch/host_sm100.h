// The model of ptx_sm100.cuh: every unit decodes what the kernel wrote - descriptors, addresses, tensor maps - as the PTX ISA
// words it, so that a wrong bit gives a wrong result or a failure.
//
//   copies            the destination is spoilt at once and gets its values some time later, in any order
//   tensor cores      do what they are told some time later, products in their order, each after the copies to tensor memory
//                     told before it; but a copy may come before products told earlier
//   barriers          end a phase by arrivals and bytes; a thread that waits for what never comes is a deadlock
//   tensor memory     begins as 0xA5, must be allocated, and freed before the block ends
//   tensor_load       leaves NaN, and the values at tensor_loaded. All lanes of a warp must come to both, and none is kept
//                     there: neither orders what the lanes do in memory, as __syncwarp does
//
//   fences            a thread needs one between a barrier and its next tensor operation, one between its tensor_load and its
//                     next arrival, and one between a barrier's init and the first copy that counts there
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>

#include "numerics/e2m1.h"
#include "numerics/e4m3.h"

namespace nvfp4 {

// What ops/_tensor_map.py packs for the model in place of a CUtensorMap: a matrix of bytes, boxes of it, 128-byte swizzle.
struct TensorMapModel {
    const u8* base;
    u64 width, rows, pitch;  // bytes, rows, bytes from row to row
    u32 box_width, box_rows;
};

class Sm100 : public host_model::BlockState {
public:
    static constexpr int lanes = 128, columns = 512, most_threads = 1024;

    static Sm100& here() {
        auto& state = host_model::block_state();
        if (!state) state.reset(new Sm100);
        return static_cast<Sm100&>(*state);
    }

    const char* complaint() const override {
        if (allocated) return "a block ended without freeing its tensor memory";
        for (u32 t = 0; t < most_threads; ++t) {
            if (loads[t].told != loads[t / 32 * 32].told) return "tcgen05.ld or its wait by some lanes of a warp alone";
        }
        return nullptr;
    }

    static u8* at(u32 address) {
        const u32 begin = host_model::shared_address(host_model::dynamic_shared());
        if (address < begin) host_model::fail("a shared address before the block's memory");
        return static_cast<u8*>(host_model::dynamic_shared()) + (address - begin);
    }

    // barriers
    struct Barrier {
        u32 count, missing, phase;
        i64 bytes;
    };
    Barrier& barrier(u32 address) {
        const auto found = barriers.find(address);
        if (found == barriers.end()) host_model::fail("a barrier that nobody initialized");
        return found->second;
    }
    void init(u32 address, u32 count) {
        if (address % 8) host_model::fail("mbarrier.init: the address is no multiple of 8");
        made = false;
        std::memset(at(address), 0, 8);
        barriers[address] = {count, count, 0, 0};
    }
    void arrive(u32 address, u32 arrivals, i64 bytes) {  // bytes: more to expect, or, below zero, come
        Barrier& b = barrier(address);
        if (b.missing < arrivals) host_model::fail("more arrivals at a barrier than it counts");
        b.missing -= arrivals;
        b.bytes += bytes;
        if (b.missing || b.bytes) return;
        b.phase ^= 1;
        b.missing = b.count;
        host_model::wake();
    }
    void wait(u32 address, u32 parity) {
        Barrier& b = barrier(address);
        host_model::rest_until([&b, parity] { return b.phase != parity; });
        after[threadIdx.x] = true;
    }
    void arrive_from_thread(u32 address, i64 bytes) {
        if (before[threadIdx.x]) host_model::fail("an arrival after tcgen05.ld, no fence between");
        arrive(address, 1, bytes);
    }

    // fences
    void fence_barriers() { made = true; }
    void fence_before() { before[threadIdx.x] = false; }
    void fence_after() { after[threadIdx.x] = false; }
    void tensor_operation() {
        if (after[threadIdx.x]) host_model::fail("a tensor operation after a barrier, no fence between");
    }

    // copies
    void counts(u32 barrier_at) {
        barrier(barrier_at);
        if (!made) host_model::fail("a copy that counts at a barrier no fence has made known");
    }
    static void aligned(u64 value, u64 to, const char* what) {
        if (value % to) host_model::fail(what);
    }
    void copy_box(u32 to, const TensorMap* map, i32 x, i32 y, u32 barrier_at) {
        TensorMapModel m;
        std::memcpy(&m, map, sizeof m);
        aligned(to, 128, "cp.async.bulk.tensor: a destination that is no multiple of 128");
        aligned(reinterpret_cast<u64>(m.base), 16, "tensor map: a matrix that begins at no multiple of 16");
        aligned(m.pitch, 16, "tensor map: rows that begin at no multiple of 16");
        if (m.box_width != 128 || m.box_rows > 256) host_model::fail("tensor map: a box that 128-byte swizzle does not fit");
        counts(barrier_at);
        std::memset(at(to), 0xA5, 128 * m.box_rows);
        host_model::later(host_model::any_order, [=, this] {
            for (u32 i = 0; i < 128 * m.box_rows; ++i) {
                const i64 row = y + static_cast<i64>(i / 128), col = x + static_cast<i64>(i % 128);
                const bool inside = row >= 0 && col >= 0 && u64(row) < m.rows && u64(col) < m.width;
                *at(swizzled(to + i)) = inside ? m.base[static_cast<u64>(row) * m.pitch + static_cast<u64>(col)] : u8(0);
            }
            arrive(barrier_at, 0, -static_cast<i64>(128 * m.box_rows));
        });
    }
    void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier_at) {
        aligned(to | bytes | reinterpret_cast<u64>(from), 16, "cp.async.bulk: an address or size that is no multiple of 16");
        counts(barrier_at);
        std::memset(at(to), 0xA5, bytes);
        host_model::later(host_model::any_order, [=, this] {
            std::memcpy(at(to), from, bytes);
            arrive(barrier_at, 0, -static_cast<i64>(bytes));
        });
    }
    // Bits 4..6 of an address change with bits 7..9: within each 1024 bytes the chunk of 16 bytes, by its row of 128
    // (PTX ISA, "Swizzling Modes").
    static u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

    // tensor memory
    void allocate(u32 address_to) {
        if (allocated) host_model::fail("tcgen05.alloc: more than there is");
        allocated = true;
        const u32 base = 0;
        std::memcpy(at(address_to), &base, 4);
        std::memset(memory, 0xA5, sizeof memory);
    }
    void free() {
        if (!allocated) host_model::fail("tcgen05.dealloc: nothing is allocated");
        allocated = false;
    }
    u32* cells(u32 lane, u32 column, u32 count) {
        if (!allocated) host_model::fail("tensor memory that is not allocated");
        if (lane >= lanes || column + count > columns) host_model::fail("a tensor address beyond tensor memory");
        return memory[lane] + column;
    }

    // Byte `byte` of row `row` of a matrix in shared memory (PTX ISA, "Shared memory descriptor", "Canonical layouts", k-major).
    static u8 matrix_byte(u64 d, u32 row, u32 byte) {
        const u32 start = static_cast<u32>(d & 0x3FFFu) << 4, eight_rows = static_cast<u32>(d >> 32 & 0x3FFFu) << 4;
        const u32 leading = static_cast<u32>(d >> 16 & 0x3FFFu) << 4, swizzle = static_cast<u32>(d >> 61);
        if ((d >> 46 & 7u) != 1 || (d >> 49 & 0xFFFu) != 0) host_model::fail("a shared memory descriptor's constant bits");
        if (swizzle == 0) return *at(start + row / 8 * eight_rows + row % 8 * 16 + byte / 16 * leading + byte % 16);
        if (swizzle != 2) host_model::fail("a shared memory descriptor's swizzle is not modelled");
        return *at(swizzled(start + row / 8 * eight_rows + row % 8 * 128 + byte));
    }
    void copy_to_tensor(u32 tensor, u64 matrix) {
        tensor_operation();
        copies.push_back([=, this] {
            if (tensor >> 16) host_model::fail("tcgen05.cp: a lane other than 0");
            for (u32 row = 0; row < 32; ++row) {
                u8 bytes[16];
                for (u32 i = 0; i < 16; ++i) bytes[i] = matrix_byte(matrix, row, i);
                for (u32 lane = row; lane < lanes; lane += 32) std::memcpy(cells(lane, tensor & 0xFFFFu, 4), bytes, 16);
            }
        });
        host_model::later(copy_order, [this, n = ++copies_told] { copy_until(n); });
    }
    void copy_until(u64 told) {
        for (; copies_done < told; ++copies_done, copies.pop_front()) copies.front()();
    }
    // Scale of block `block` of K = 64 of a row: the row's lane is row % 32, its column row / 32, in all four times 32 lanes
    // (PTX ISA, "Block scaling", scale_vec::4X). Each quarter of the lanes reads its own copy: rows of a by the lane they
    // are, rows of b by any.
    float scale(u32 tensor, u32 row, u32 block, u32 quarter) {
        const u32 lane = 32 * quarter + row % 32, word = *cells(lane, (tensor & 0xFFFFu) + row / 32, 1);
        const u32 code = word >> 8 * block & 0xFFu;
        if (code & 0x80u) host_model::fail("a block scale with a sign");
        return values().of_e4m3[code];
    }
    struct Values {
        float of_e2m1[16], of_e4m3[128];
        Values() {
            for (u32 i = 0; i < 16; ++i) of_e2m1[i] = e2m1_decode<F32x1>(U32x1(i)).v;
            for (u32 i = 0; i < 128; ++i) of_e4m3[i] = e4m3_decode<F32x1>(U32x1(i)).v;
        }
    };
    static const Values& values() {
        static const Values all;
        return all;
    }
    void decode(u64 matrix, u32 scales, u32 row, u32 quarter, float* out) {
        if (scales >> 16 || scales % 4) host_model::fail("tcgen05.mma: scales begin at lane 0, at a multiple of four columns");
        for (u32 block = 0; block < 4; ++block) {
            const float s = scale(scales, row, block, quarter);
            for (u32 i = 0; i < 8; ++i) {
                const u32 byte = matrix_byte(matrix, row, 8 * block + i);
                for (u32 half = 0; half < 2; ++half) {
                    out[16 * block + 2 * i + half] = values().of_e2m1[byte >> 4 * half & 15u] * s;
                }
            }
        }
    }
    void multiply(u32 d, u64 a, u64 b, u32 kind, u32 a_scales, u32 b_scales, bool add) {
        tensor_operation();
        host_model::later(tensor_order, [=, this, told = copies_told] {
            copy_until(told);
            const u32 m = (kind >> 24 & 31u) * 16, n = (kind >> 17 & 63u) * 8;
            if ((kind & ~(31u << 24 | 63u << 17)) != (1u << 7 | 1u << 10)) {
                host_model::fail("an instruction descriptor other than of E2M1 x E2M1 under UE4M3 scales");
            }
            if (m != 128 || n == 0 || n > 256 || d >> 16) host_model::fail("tcgen05.mma: a shape that there is not");
            std::unique_ptr<float[]> left(new float[128 * 64]), right(new float[4 * 64 * n]);
            float row_of_b[64];
            for (u32 i = 0; i < m; ++i) decode(a, a_scales, i, i / 32, &left[64 * i]);
            for (u32 quarter = 0; quarter < 4; ++quarter) {
                for (u32 j = 0; j < n; ++j) {
                    decode(b, b_scales, j, quarter, row_of_b);
                    for (u32 k = 0; k < 64; ++k) right[(quarter * 64 + k) * n + j] = row_of_b[k];
                }
            }
            for (u32 i = 0; i < m; ++i) {
                u32* cell = cells(i, d, n);
                double sums[256];
                for (u32 j = 0; j < n; ++j) sums[j] = add ? static_cast<double>(real(U32x1(cell[j])).v) : 0.0;
                products(&left[64 * i], &right[i / 32 * 64 * n], n, sums);
                for (u32 j = 0; j < n; ++j) cell[j] = bits(F32x1(static_cast<float>(sums[j]))).v;
            }
        });
    }
    // What takes the time: without the sanitizer, and as fast as it goes.
    __attribute__((optimize("O3"), no_sanitize("address"), noinline)) static void products(const float* left, const float* right,
                                                                                           u32 n, double* sums) {
        for (u32 k = 0; k < 64; ++k) {
            const double x = static_cast<double>(left[k]);
            for (u32 j = 0; j < n; ++j) sums[j] += x * static_cast<double>(right[k * n + j]);
        }
    }
    void commit(u32 barrier_at) {
        barrier(barrier_at);
        host_model::later(tensor_order, [=, this, told = copies_told] {
            copy_until(told);
            arrive(barrier_at, 1, 0);
        });
    }
    void load(u32 tensor, float* v) {
        tensor_operation();
        before[threadIdx.x] = true;
        const u32 mine = 32 * (threadIdx.x / 32 % 4);
        if (tensor >> 16 != mine) host_model::fail("tcgen05.ld: a warp reads the 32 lanes of its own alone");
        for (int i = 0; i < 32; ++i) v[i] = real(U32x1(0x7FC0A5A5u)).v;
        loads[threadIdx.x] = {tensor, loads[threadIdx.x].told + 1};
    }
    void loaded(float* v) {
        const u32 tensor = loads[threadIdx.x].tensor;
        ++loads[threadIdx.x].told;
        const u32* cell = cells((tensor >> 16) + threadIdx.x % 32, tensor & 0xFFFFu, 32);
        for (int i = 0; i < 32; ++i) v[i] = real(U32x1(cell[i])).v;
    }

private:
    static constexpr int tensor_order = 1, copy_order = 2;
    std::deque<std::function<void()>> copies;
    u64 copies_told = 0, copies_done = 0;
    std::map<u32, Barrier> barriers;
    struct Load {
        u32 tensor, told;  // of the one on its way; loads and waits so far
    } loads[most_threads] = {};
    std::map<unsigned, bool> before, after;  // by thread: a fence is due
    bool made = false, allocated = false;
    u32 memory[lanes][columns];
};

static inline bool elected() {
    host_model::exchange("elect.sync", "", 1);
    return host_model::lane() == 0;
}
static inline void barrier_init(u32 barrier, u32 count) { Sm100::here().init(barrier, count); }
static inline void barriers_made() { Sm100::here().fence_barriers(); }
static inline void barrier_arrive(u32 barrier) { Sm100::here().arrive_from_thread(barrier, 0); }
static inline void barrier_expect(u32 barrier, u32 bytes) {
    Sm100::here().arrive_from_thread(barrier, static_cast<i64>(bytes));
}
static inline void barrier_wait(u32 barrier, u32 parity) { Sm100::here().wait(barrier, parity); }
static inline void copy_box(u32 to, const TensorMap* map, i32 x, i32 y, u32 barrier) {
    Sm100::here().copy_box(to, map, x, y, barrier);
}
static inline void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    Sm100::here().copy_bytes(to, from, bytes, barrier);
}
static inline void tensor_allocate(u32 address_to) {
    host_model::exchange("tcgen05.alloc", "", 1);
    if (host_model::lane() == 0) Sm100::here().allocate(address_to);
}
static inline void tensor_free(u32) {
    host_model::exchange("tcgen05.dealloc", "", 1);
    if (host_model::lane() == 0) Sm100::here().free();
}
static inline void tensor_fence_before() { Sm100::here().fence_before(); }
static inline void tensor_fence_after() { Sm100::here().fence_after(); }
static inline void tensor_copy(u32 tensor, u64 matrix) { Sm100::here().copy_to_tensor(tensor, matrix); }
static inline void tensor_multiply(u32 d, u64 a, u64 b, u32 kind, u32 a_scales, u32 b_scales, bool add) {
    Sm100::here().multiply(d, a, b, kind, a_scales, b_scales, add);
}
static inline void tensor_commit(u32 barrier) { Sm100::here().commit(barrier); }
static inline void tensor_load(u32 tensor, float (&v)[32]) { Sm100::here().load(tensor, v); }
static inline void tensor_loaded(float (&v)[32]) { Sm100::here().loaded(v); }

}  // namespace nvfp4

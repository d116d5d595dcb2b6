// CUDA's names for a C++ compiler: csrc/*/cuda.cu compiled with this header runs on the CPU, two blocks or clusters at a time,
// each thread a fiber. What is modelled is what a kernel can get wrong: who sees which value when.
// tests/native/cuda/host_model.cpp schedules.
//
//   shared memory     allocated at its exact size for each block, filled with 0xA5 (the address sanitizer guards its ends)
//   __syncthreads     every thread of the block must come to it, or the launch fails
//   warp operations   all 32 lanes must come to the same one (kernels use full masks only)
//   cp.async          the destination is spoilt at once and gets its values no sooner than at the wait for its group
//   clusters          its blocks live together; what a thread stores to another's shared memory is spoilt there at once and
//                     arrives no sooner than at the barrier of the cluster to which the thread comes next
//   addresses         of shared memory begin where an instruction that wants more than 16 bytes of alignment must notice
//   thread order      drawn from a seed, and that of two blocks: with a barrier missing, results depend on it
//   __threadfence     what a thread stores for other blocks they may load after a fence of its own and then one of theirs
//   atomicAdd         the block may rest then until the other has ended, which sees all that is not written yet as it was
#pragma once
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

namespace host_model {

struct Dim3 {
    unsigned x, y, z;
};

// Of the running thread and its launch.
const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_size();
const Dim3& grid_size();

[[noreturn]] void fail(const char* what);
void barrier();
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);

// Every lane leaves up to `slot` bytes; once all have, each sees everybody's, until it takes part in the next but one.
constexpr size_t slot = 64;
const unsigned char (*exchange(const char* operation, const void* mine, size_t bytes))[slot];
int lane();
void told_others();  // another block may now run to its end before this one does anything more
void stored_for_others(const void* at);
void loads_from_others(const void* at);
void fence();  // of the running thread's own stores and loads

// For the models of units that work beside the threads, such as arch/host_sm100.h. The running thread rests until something is
// so, which `wake` looks after; a unit's work is done some time later, that of any_order in any, of another number in its order.
void rest_until(std::function<bool()> so);
void wake();
constexpr int any_order = 0;
void later(int unit, std::function<void()> work);

// What such models keep of the running block; empty when it begins.
struct BlockState {
    virtual ~BlockState() = default;
    virtual const char* complaint() const = 0;  // once all threads have ended
};
std::unique_ptr<BlockState>& block_state();

void copy_async(void* to, const void* from, int bytes, int bytes_from);
void commit_copies();
void wait_copies(int groups_left);
void show_copies();   // this thread's, to what reads shared memory on its own
bool copies_shown();  // those of every thread that have arrived

unsigned shared_address(const void* p);  // as instructions take them

// Of a cluster: the address of block `rank`'s shared memory where `address` is in the running one's; stores to such addresses.
unsigned remote_address(unsigned address, unsigned rank);
void store_remote(unsigned to, const void* value, size_t bytes);
void cluster_arrive();
void cluster_wait();

// What an architecture's instructions keep for the running thread, and what must be done when it ends.
struct Pending {
    virtual ~Pending() = default;
    virtual bool done() const = 0;
};
std::unique_ptr<Pending>& pending();

struct Kernel {  // makes a kernel known by name
    using Entry = void (*)(const void*);
    Kernel(const char* name, Entry entry, size_t parameters, unsigned threads, unsigned cluster);
};

template <class T>
T shuffled(const char* operation, T value, int from) {
    T out;
    std::memcpy(&out, exchange(operation, &value, sizeof(T))[from & 31], sizeof(T));
    return out;
}

}  // namespace host_model

struct alignas(16) float4 {
    float x, y, z, w;
};

#define threadIdx host_model::thread_index()
#define blockIdx host_model::block_index()
#define blockDim host_model::block_size()
#define gridDim host_model::grid_size()

static inline void __syncthreads() { host_model::barrier(); }
static inline void __syncwarp() { host_model::exchange("__syncwarp", "", 1); }
static inline void __threadfence() { host_model::fence(); }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return host_model::shuffled("__shfl_sync", value, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return host_model::shuffled("__shfl_xor_sync", value, host_model::lane() ^ mask);
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    const auto* all = host_model::exchange("__ballot_sync", &predicate, sizeof predicate);
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) {
        int vote;
        std::memcpy(&vote, all[i], sizeof vote);
        votes |= vote ? 1u << i : 0u;
    }
    return votes;
}

// A fiber gives way at its own will only, so that plain code is atomic.
static inline unsigned atomicAdd(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at = before + value;
    host_model::told_others();
    return before;
}
static inline unsigned atomicMax(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at = before > value ? before : value;
    return before;
}

// Shared memory of fixed type: a name for it. And the kernel itself: extern "C", one parameter block `p`.
#define NVFP4_SHARED(Type, name)  \
    static const char name##_key = 0; \
    Type& name = *static_cast<Type*>(host_model::static_shared(&name##_key, sizeof(Type)))
#define NVFP4_DYNAMIC_SHARED(name) unsigned char* const name = static_cast<unsigned char*>(host_model::dynamic_shared())
#define NVFP4_KERNEL(name, threads, blocks, Parameters) NVFP4_CLUSTER_KERNEL(name, threads, blocks, 1, Parameters)
#define NVFP4_CLUSTER_KERNEL(name, threads, blocks, cluster, Parameters)                                              \
    static void name(const Parameters& p);                                                                            \
    static const host_model::Kernel name##_entry(                                                                     \
        #name, [](const void* given) { name(*static_cast<const Parameters*>(given)); }, sizeof(Parameters), threads,   \
        cluster);                                                                                                     \
    static void name(const Parameters& p)

// Runs the kernels of csrc/*/cuda.cu on the CPU: csrc/arch/host_model.h says what the model promises. The face of it is
// nvfp4_model_launch, which takes what cuLaunchKernel takes.
#include "arch/host_model.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a call must keep on the present stack, and goes on with those of another (System V ABI, x86-64).
extern "C" void nvfp4_switch_stack(void** save, void* load);
asm(R"(
.text
.globl nvfp4_switch_stack
.type nvfp4_switch_stack, @function
nvfp4_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size nvfp4_switch_stack, .-nvfp4_switch_stack
)");

namespace host_model {
namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr std::uint64_t unfenced = ~std::uint64_t(0);

struct Copy {
    void* to;
    const void* from;
    int bytes, bytes_from;
};

struct Sent {  // to another block's shared memory
    unsigned char* to;
    std::string bytes;
};

struct Thread {
    Dim3 index;
    std::unique_ptr<char[]> stack;
    void* place = nullptr;  // stack pointer while it rests
    void* fake = nullptr;   // the sanitizer's
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    bool unshown = false;  // copies have arrived that only this thread and, after a barrier, plain reads of others see
    std::unique_ptr<Pending> pending;
    std::vector<Sent> sent;    // since it last came to the cluster's barrier
    bool at_cluster = false;   // it has arrived there and not waited
    bool met_cluster = false;  // it has waited once: all blocks have begun
    std::uint64_t phase = 0;   // of the barrier at which it has arrived
    std::vector<const void*> stored;  // for other blocks since its last fence
    std::uint64_t fenced = 0;         // the number of that fence
};

struct Warp {
    int arrived = 0;
    std::uint64_t turn = 0;
    const char* operation = nullptr;
    unsigned char slots[2][32][slot];
};

struct Failed {};  // thrown by a unit's work

struct Entry {
    Kernel::Entry run;
    size_t parameters;
    unsigned threads, cluster;
};
std::map<std::string, Entry>& kernels() {
    static std::map<std::string, Entry> all;
    return all;
}

struct Cluster;
struct Block {
    Dim3 at;
    Cluster* cluster;
    int slot;        // which threads are its cluster's
    unsigned first;  // and of these its own
    std::vector<Warp> warps;
    std::vector<unsigned> ready, at_barrier;
    std::unique_ptr<unsigned char[]> dynamic;
    std::map<const void*, std::unique_ptr<unsigned char[]>> statics;
    unsigned running = 0, finished = 0, unshown = 0;  // unshown: threads with copies that are so
    std::vector<std::pair<unsigned, std::function<bool()>>> sleepers;  // a thread, and what it waits for
    std::map<int, std::deque<std::function<void()>>> units;
    std::unique_ptr<BlockState> state;
};

// Blocks that live together, mostly one.
struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::pair<Block*, unsigned>> waiting;  // threads at the barrier
    std::vector<Sent> sent;                            // by those who have arrived there
    unsigned arrived = 0;
    std::uint64_t phase = 0;
};

struct Launch {
    Dim3 grid, block;
    const Entry* entry;
    const void* parameters;
    size_t dynamic_bytes;
    std::uint64_t random;  // 0: threads in order
    bool in_unit = false;
    const Block* resting = nullptr;  // until the other ends
    std::uint64_t fences = 0;
    std::map<const void*, std::uint64_t> stored{};  // for other blocks: the fence that followed, `unfenced` before it
    std::string error{};
    void* scheduler = nullptr;
    void* scheduler_fake = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
};
Launch* now = nullptr;
Block* here = nullptr;
std::vector<Thread> threads[2];  // of two clusters; stacks live from launch to launch

Thread& me() { return threads[here->slot][here->first + here->running]; }

void leave([[maybe_unused]] bool for_good) {
    Thread& mine = me();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &mine.fake, now->scheduler_stack, now->scheduler_stack_bytes);
#endif
    nvfp4_switch_stack(&mine.place, now->scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(me().fake, nullptr, nullptr);
#endif
}

void resume(unsigned t) {
    here->running = t;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&now->scheduler_fake, me().stack.get(), stack_bytes);
#endif
    nvfp4_switch_stack(&now->scheduler, me().place);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(now->scheduler_fake, nullptr, nullptr);
#endif
}

void life() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &now->scheduler_stack, &now->scheduler_stack_bytes);
#endif
    now->entry->run(now->parameters);
    if (!me().open.empty() || !me().groups.empty()) fail("a thread ended with copies that it never waited for");
    if (me().pending && !me().pending->done()) fail("a thread ended with products that it never waited for");
    if (me().at_cluster) fail("a thread ended at a barrier of the cluster that it never waited for");
    if (!me().sent.empty()) fail("a thread ended with stores to another block that no barrier of the cluster follows");
    ++here->finished;
    leave(true);
    std::abort();
}

void make_fiber(Thread& thread) {
    if (!thread.stack) thread.stack.reset(new char[stack_bytes]);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack.get(), stack_bytes);
#endif
    auto top = reinterpret_cast<std::uintptr_t>(thread.stack.get() + stack_bytes) & ~std::uintptr_t(15);
    void** at = reinterpret_cast<void**>(top) - 2;  // where the ABI wants the stack when a function begins
    *at = reinterpret_cast<void*>(&life);
    thread.place = at - 6;
    std::fill(at - 6, at, nullptr);
    thread.fake = nullptr;
    thread.open.clear();
    thread.groups.clear();
    thread.unshown = false;
    thread.pending.reset();
    thread.sent.clear();
    thread.stored.clear();
    thread.fenced = 0;
    thread.at_cluster = thread.met_cluster = false;
}

size_t draw(size_t count) {  // the last, or any
    if (!now->random) return count - 1;
    std::uint64_t& x = now->random;  // xorshift64
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x % count;
}

unsigned next_ready() {
    std::vector<unsigned>& ready = here->ready;
    const size_t i = draw(ready.size());
    const unsigned t = ready[i];
    ready[i] = ready.back();
    ready.pop_back();
    return t;
}

void work(int unit) {
    auto& queue = here->units[unit];
    const size_t i = unit == any_order ? draw(queue.size()) : 0;
    const auto job = std::move(queue[i]);
    queue.erase(queue.begin() + static_cast<std::ptrdiff_t>(i));
    now->in_unit = true;
    try {
        job();
    } catch (const Failed&) {
    }
    now->in_unit = false;
}

// One step of a thread or of a unit of the block; with threads in order, of a unit only when no thread can go on.
bool step() {
    std::vector<int> busy;
    for (const auto& [unit, queue] : here->units) {
        if (!queue.empty()) busy.push_back(unit);
    }
    const size_t threads_ready = here->ready.size();
    if (!now->error.empty() || threads_ready + busy.size() == 0) return false;
    const size_t i = now->random ? draw(threads_ready + busy.size()) : threads_ready ? 0 : draw(busy.size());
    if (i < threads_ready) resume(next_ready());
    else work(busy[i - threads_ready]);
    return true;
}

std::unique_ptr<unsigned char[]> spoilt(size_t bytes) {
    std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
    std::memset(memory.get(), 0xA5, bytes);
    return memory;
}

std::unique_ptr<Block> begin_block(unsigned i, Cluster* cluster, int slot, unsigned first) {
    std::unique_ptr<Block> block(new Block);
    block->at = {i % now->grid.x, i / now->grid.x % now->grid.y, i / now->grid.x / now->grid.y};
    block->cluster = cluster, block->slot = slot, block->first = first;
    block->warps.resize(now->block.x / 32);
    block->dynamic = spoilt(now->dynamic_bytes);
    for (unsigned t = now->block.x; t-- > 0;) {
        threads[slot][first + t].index = {t, 0, 0};
        make_fiber(threads[slot][first + t]);
        block->ready.push_back(t);
    }
    return block;
}

std::unique_ptr<Cluster> begin_cluster(unsigned i, int slot) {
    const unsigned size = now->entry->cluster, of_block = now->block.x;
    std::unique_ptr<Cluster> cluster(new Cluster);
    threads[slot].resize(std::max<size_t>(threads[slot].size(), size * of_block));
    for (unsigned rank = 0; rank < size; ++rank) {
        cluster->blocks.push_back(begin_block(i * size + rank, cluster.get(), slot, rank * of_block));
    }
    return cluster;
}

// A step of one of its blocks; false when none can go on.
bool step_in(const Cluster& cluster) {
    const size_t size = cluster.blocks.size(), first = draw(size);
    for (size_t i = 0; i < size; ++i) {
        here = cluster.blocks[(first + i) % size].get();
        if (step()) return true;
    }
    return false;
}

void end_cluster(const Cluster& cluster) {
    for (const auto& block : cluster.blocks) {
        const Block& b = *block;
        if (!now->error.empty()) return;
        if (b.state && b.state->complaint()) now->error = b.state->complaint();
        if (b.finished == now->block.x) continue;
        now->error = "deadlock: " + std::to_string(b.finished) + " of " + std::to_string(now->block.x) + " threads ended, " +
                     std::to_string(b.at_barrier.size()) + " wait at __syncthreads, " + std::to_string(b.sleepers.size()) +
                     " at barriers in shared memory, " + std::to_string(cluster.waiting.size()) +
                     " of all blocks at the cluster's, the others in their warps";
    }
}

// With threads in order one cluster after the other, else two at a time, a step of either by lot.
void run_clusters(unsigned count, bool backwards) {
    std::unique_ptr<Cluster> alive[2];
    unsigned begun = 0;
    while (now->error.empty()) {
        for (int slot = 0; slot < (now->random ? 2 : 1); ++slot) {
            if (!alive[slot] && begun < count) alive[slot] = begin_cluster(backwards ? count - ++begun : begun++, slot);
        }
        const size_t turn = now->resting ? 1 - now->resting->slot : draw(2);
        auto& cluster = alive[alive[turn] ? turn : 1 - turn];
        if (!cluster) return;
        if (step_in(*cluster)) continue;
        end_cluster(*cluster);
        cluster.reset();
        now->resting = nullptr;
    }
}

void finish(const Copy& c) {
    std::memset(c.to, 0, static_cast<size_t>(c.bytes));
    if (c.bytes_from) std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes_from));
}

}  // namespace

const Dim3& thread_index() { return me().index; }
const Dim3& block_index() { return here->at; }
const Dim3& block_size() { return now->block; }
const Dim3& grid_size() { return now->grid; }
int lane() { return static_cast<int>(here->running % 32); }

void fail(const char* what) {
    if (now->error.empty()) now->error = what;
    if (now->in_unit) throw Failed();
    leave(true);
    std::abort();
}

void barrier() {
    here->at_barrier.push_back(here->running);
    if (here->at_barrier.size() == now->block.x) {
        here->ready.insert(here->ready.end(), here->at_barrier.begin(), here->at_barrier.end());
        here->at_barrier.clear();
    }
    leave(false);
}

const unsigned char (*exchange(const char* operation, const void* mine, size_t bytes))[slot] {
    Warp& warp = here->warps[here->running / 32];
    if (warp.arrived == 0) warp.operation = operation;
    if (std::strcmp(warp.operation, operation) != 0) fail("the lanes of a warp have come to different operations");
    unsigned char(*slots)[slot] = warp.slots[warp.turn % 2];
    std::memcpy(slots[lane()], mine, bytes);
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        ++warp.turn;
        for (unsigned t = here->running / 32 * 32; t < here->running / 32 * 32 + 32; ++t) here->ready.push_back(t);
    }
    leave(false);
    return slots;
}

void rest_until(std::function<bool()> so) {
    if (so()) return;
    here->sleepers.push_back({here->running, std::move(so)});
    leave(false);
}

void wake() {
    auto& all = here->sleepers;
    const auto awake = std::partition(all.begin(), all.end(), [](const auto& sleeper) { return !sleeper.second(); });
    for (auto s = awake; s != all.end(); ++s) here->ready.push_back(s->first);
    all.erase(awake, all.end());
}

void told_others() {
    if (!now->random || now->resting || draw(2)) return;
    now->resting = here;
    here->ready.push_back(here->running);
    leave(false);
}

void stored_for_others(const void* at) {
    now->stored[at] = unfenced;
    me().stored.push_back(at);
}

void loads_from_others(const void* at) {
    const auto found = now->stored.find(at);
    if (found == now->stored.end()) return;
    if (found->second == unfenced) fail("a load from other blocks of what no fence has followed yet");
    if (found->second > me().fenced) fail("a load from other blocks without a fence before it");
}

void fence() {
    me().fenced = ++now->fences;
    for (const void* at : me().stored) now->stored[at] = now->fences;
    me().stored.clear();
}

void later(int unit, std::function<void()> work) { here->units[unit].push_back(std::move(work)); }

std::unique_ptr<BlockState>& block_state() { return here->state; }

void* dynamic_shared() { return here->dynamic.get(); }

void* static_shared(const void* key, size_t bytes) {
    auto& memory = here->statics[key];
    if (!memory) memory = spoilt(bytes);
    return memory.get();
}

void copy_async(void* to, const void* from, int bytes, int bytes_from) {
    const auto size = static_cast<std::uintptr_t>(bytes);
    if (reinterpret_cast<std::uintptr_t>(to) % size || (bytes_from && reinterpret_cast<std::uintptr_t>(from) % size)) {
        fail("cp.async: an address is no multiple of the copy's size");
    }
    if (bytes_from < 0 || bytes_from > bytes) fail("cp.async: bytes read beyond the size of the copy");
    std::memset(to, 0xA5, static_cast<size_t>(bytes));
    me().open.push_back({to, from, bytes, bytes_from});
}

void commit_copies() {
    me().groups.push_back(std::move(me().open));
    me().open.clear();
}

void wait_copies(int groups_left) {
    auto& groups = me().groups;
    for (; groups.size() > static_cast<size_t>(groups_left); groups.pop_front()) {
        for (const Copy& c : groups.front()) finish(c);
        if (!groups.front().empty() && !me().unshown) me().unshown = true, ++here->unshown;
    }
}

void show_copies() {
    if (me().unshown) me().unshown = false, --here->unshown;
}
bool copies_shown() { return here->unshown == 0; }

// The first address is a multiple of 16, as the hardware promises, and of no more.
constexpr unsigned first_address = 0x410;
unsigned shared_address(const void* p) {
    return first_address + static_cast<unsigned>(static_cast<const unsigned char*>(p) - here->dynamic.get());
}

unsigned remote_address(unsigned address, unsigned rank) {
    if (rank >= here->cluster->blocks.size()) fail("mapa: a block that the cluster has not");
    return (rank + 1) << 24 | address;
}

void store_remote(unsigned to, const void* value, size_t bytes) {
    if (to >> 24 == 0) fail("st.shared::cluster: an address of the block's own shared memory");
    const Block& block = *here->cluster->blocks[(to >> 24) - 1];
    if (!me().met_cluster) fail("st.shared::cluster: no barrier of the cluster yet, the block may not have begun");
    if (block.finished == now->block.x) fail("st.shared::cluster: the block has ended");
    if (to % bytes) fail("st.shared::cluster: an address is no multiple of the store's size");
    unsigned char* const at = block.dynamic.get() + ((to & 0xFFFFFFu) - first_address);
    std::memset(at, 0xA5, bytes);
    me().sent.push_back({at, std::string(static_cast<const char*>(value), bytes)});
}

void cluster_arrive() {
    exchange("barrier.cluster.arrive", "", 1);
    Thread& self = me();
    Cluster& all = *here->cluster;
    if (self.at_cluster) fail("barrier.cluster: arrived twice without a wait");
    self.at_cluster = true;
    self.phase = all.phase;
    std::move(self.sent.begin(), self.sent.end(), std::back_inserter(all.sent));
    self.sent.clear();
    if (++all.arrived < now->block.x * all.blocks.size()) return;
    for (const Sent& s : all.sent) std::memcpy(s.to, s.bytes.data(), s.bytes.size());
    for (const auto& [block, thread] : all.waiting) block->ready.push_back(thread);
    all.sent.clear();
    all.waiting.clear();
    all.arrived = 0;
    ++all.phase;
}

void cluster_wait() {
    exchange("barrier.cluster.wait", "", 1);
    if (!me().at_cluster) fail("barrier.cluster: a wait without an arrival");
    me().at_cluster = false;
    me().met_cluster = true;
    if (me().phase != here->cluster->phase) return;
    here->cluster->waiting.push_back({here, here->running});
    leave(false);
}

std::unique_ptr<Pending>& pending() { return me().pending; }

Kernel::Kernel(const char* name, Entry entry, size_t parameters, unsigned most_threads, unsigned cluster) {
    kernels()[name] = {entry, parameters, most_threads, cluster};
}

}  // namespace host_model

// 0, or 1 and the reason in `message` (of 256 bytes). seed 0 runs threads in order, another in an order drawn from it.
extern "C" int nvfp4_model_launch(const char* name, const unsigned* grid, unsigned block, size_t dynamic_bytes,
                                  const void* parameters, size_t parameter_bytes, std::uint64_t seed, char* message) {
    using namespace host_model;
    const auto say = [&](const std::string& what) {
        std::snprintf(message, 256, "%s: %s", name, what.c_str());
        return 1;
    };
    const auto found = kernels().find(name);
    if (found == kernels().end()) return say("no such kernel");
    const auto& entry = found->second;
    if (entry.parameters != parameter_bytes) return say("parameters of another size than the kernel's");
    if (block == 0 || block % 32 || block > entry.threads) return say("a block of so many threads cannot be launched");
    if (dynamic_bytes > (227u << 10)) return say("more shared memory than a processor has");
    if (grid[0] % entry.cluster) return say("a grid that is no multiple of the cluster");
    Launch launch = {{grid[0], grid[1], grid[2]}, {block, 1, 1}, &entry, parameters, dynamic_bytes, seed};
    now = &launch;
    run_clusters(grid[0] * grid[1] * grid[2] / entry.cluster, seed % 2);  // odd seeds from the last block to the first
    now = nullptr;
    return launch.error.empty() ? 0 : say(launch.error);
}

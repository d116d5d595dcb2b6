// torch loads libgomp (or libiomp5, which has the same entry points) globally. A second pool beside it would fight for the
// same cores, its threads spinning, so we look the entry points up in the process and link no OpenMP ourselves.
#include "threads.h"

#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace nvfp4 {
namespace {

using ParallelFn = void (*)(void (*)(void*), void*, unsigned, unsigned);
using CountFn = int (*)();

struct Pool {
    ParallelFn parallel = nullptr;
    CountFn thread = nullptr, threads = nullptr;
    Pool() {
#if !defined(_WIN32)
        parallel = reinterpret_cast<ParallelFn>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        thread = reinterpret_cast<CountFn>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
        threads = reinterpret_cast<CountFn>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
        if (!thread || !threads) parallel = nullptr;
#endif
    }
};

const Pool& pool() {
    static const Pool instance;
    return instance;
}

struct Job {
    ThreadBody body;
    void* context;
};

void omp_entry(void* data) {
    const Job& job = *static_cast<Job*>(data);
    const DefaultFloats floats;
    job.body(job.context, pool().thread(), pool().threads());
}

}  // namespace

void run_threads(int threads, ThreadBody body, void* context) {
    if (threads <= 1) {
        const DefaultFloats floats;
        body(context, 0, 1);
    } else if (pool().parallel) {
        Job job{body, context};
        pool().parallel(omp_entry, &job, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int t = 1; t < threads; ++t) {
            others.emplace_back([=] {
                const DefaultFloats floats;
                body(context, t, threads);
            });
        }
        {
            const DefaultFloats floats;
            body(context, 0, threads);
        }
        for (auto& other : others) other.join();
    }
}

}  // namespace nvfp4

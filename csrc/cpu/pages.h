// Large results in large pages: the first touch of a fresh page clears and maps it, which for results of hundreds of megabytes
// (the gradients of all experts) takes as long as their products. In 2 MB pages that is one fault where there were 512.
#pragma once
#include "numerics/lane.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nvfp4 {

// A hint for the whole pages within `bytes` bytes at `memory`; a system without large pages does as it always did.
static inline void use_large_pages(void* memory, i64 bytes) {
#if defined(__linux__)
    constexpr i64 page = 2 << 20, least = 32 << 20;  // glibc maps anew what is larger; smaller blocks are mostly touched before
    if (bytes < least) return;
    const i64 begin = reinterpret_cast<i64>(memory), first = (begin + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(first), static_cast<size_t>((begin + bytes) / page * page - first), MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

}  // namespace nvfp4

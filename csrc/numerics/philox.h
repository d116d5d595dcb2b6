// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// A block of 16 elements takes one draw: counter = (block index, offset), key = seed; byte j serves element j.
#pragma once
#include "lane.h"

namespace nvfp4 {

template <class U>
struct Draw {
    U word[4];
};

template <class U>
NVFP4_HD Draw<U> philox(U block_low, U block_high, u64 offset, u64 seed) {
    U c0 = block_low, c1 = block_high, c2 = U(static_cast<u32>(offset)), c3 = U(static_cast<u32>(offset >> 32));
    u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
    NVFP4_UNROLL
    for (int round = 0; round < 10; ++round) {
        U high0, high1;
        const U low0 = multiply_wide(c0, 0xD2511F53u, high0);
        const U low1 = multiply_wide(c2, 0xCD9E8D57u, high1);
        c0 = high1 ^ c1 ^ U(k0);
        c1 = low1;
        c2 = high0 ^ c3 ^ U(k1);
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Random byte of element j (0..15).
template <class U>
NVFP4_HD U random_byte(const Draw<U>& draw, int j) {
    return (draw.word[j >> 2] >> (8 * (j & 3))) & U(0xFFu);
}

}  // namespace nvfp4

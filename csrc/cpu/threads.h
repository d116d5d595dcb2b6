// One parallel loop over thread numbers, on the OpenMP pool the process already has.
#pragma once
#include "numerics/lane.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace nvfp4 {

// The register of the floating-point environment, its default and its bits for zero in place of subnormals.
#if defined(__x86_64__)
using FloatControl = unsigned;
constexpr FloatControl default_floats = 0x1F80, flushed_floats = 0x9FC0;
static inline FloatControl float_control() { return _mm_getcsr(); }
static inline void set_float_control(FloatControl x) { _mm_setcsr(x); }
#elif defined(__aarch64__)
using FloatControl = u64;
constexpr FloatControl default_floats = 0, flushed_floats = 1 << 24;
static inline FloatControl float_control() {
    FloatControl x;
    __asm__ volatile("mrs %0, fpcr" : "=r"(x));
    return x;
}
static inline void set_float_control(FloatControl x) { __asm__ volatile("msr fpcr, %0" : : "r"(x) : "memory"); }
#else
using FloatControl = int;
constexpr FloatControl default_floats = 0, flushed_floats = 0;
static inline FloatControl float_control() { return 0; }
static inline void set_float_control(FloatControl) {}
#endif

template <FloatControl control>
struct Floats {
    FloatControl saved = float_control();
    Floats() { set_float_control(control); }
    ~Floats() { set_float_control(saved); }
};

// torch.set_flush_denormal sets flush-to-zero in a thread; the format's definition needs subnormals, so an op works with the
// default floating-point environment, in the calling thread as in the pool's, and gives the caller's back.
using DefaultFloats = Floats<default_floats>;

// Zero for subnormals, where an op multiplies decays until nothing is left of them: such products take a CPU ten times longer.
using FlushSubnormals = Floats<flushed_floats>;

using ThreadBody = void (*)(void* context, int thread, int threads);

// Calls body(context, t, n) for t = 0 .. n - 1 with some n <= threads: a pool may grant fewer (inside another parallel
// region it grants one). Bodies must cover all work for any n and give the same bytes for any n; they must not throw.
void run_threads(int threads, ThreadBody body, void* context);

template <class Body>
inline void parallel(int threads, Body& body) {
    run_threads(threads, [](void* context, int t, int n) { (*static_cast<Body*>(context))(t, n); }, &body);
}

// Part t of n of the range [0, count), in multiples of `grain`.
struct Range {
    i64 begin, end;
};
inline Range part(i64 count, i64 grain, int t, int n) {
    const i64 units = (count + grain - 1) / grain;
    const i64 begin = units * t / n * grain, end = units * (t + 1) / n * grain;
    return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace nvfp4

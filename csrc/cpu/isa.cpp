// CPU detection by cpuid, through the compiler's builtin (it checks the operating system's register saving as well).
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace nvfp4 {
namespace {

constexpr const char* names[] = {"scalar", "neon", "avx2", "avx512", "avx512bf16"};

bool find(const char* name, Isa& found) {
    int i = 0;
    for (const char* each : names) {
        found = static_cast<Isa>(i++);
        if (!std::strcmp(name, each)) return isa_available(found);
    }
    return false;
}

Isa best() {
    for (Isa i : {Isa::avx512bf16, Isa::avx512, Isa::avx2, Isa::neon}) {
        if (isa_available(i)) return i;
    }
    return Isa::scalar;
}

std::atomic<Isa>& current() {
    static std::atomic<Isa> value{[] {
        const char* wanted = std::getenv("NVFP4_CPU_ISA");
        Isa asked;
        return wanted && find(wanted, asked) ? asked : best();
    }()};
    return value;
}

}  // namespace

bool isa_available(Isa isa) {
#if defined(NVFP4_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (isa) {
        case Isa::scalar: return true;
        case Isa::neon: return false;
        case Isa::avx2: return avx2;
        case Isa::avx512: return avx512;
        case Isa::avx512bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    }
    return false;
#elif defined(NVFP4_ARM64)
    return isa == Isa::scalar || isa == Isa::neon;
#else
    return isa == Isa::scalar;
#endif
}

bool outruns_mkl() {
#if defined(NVFP4_X86)
    __builtin_cpu_init();
    return isa() >= Isa::avx512 && __builtin_cpu_is("amd");
#else
    return false;
#endif
}

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name() { return names[static_cast<int>(isa())]; }

bool set_isa(const char* name) {
    Isa asked;
    if (!find(name, asked)) return false;
    current().store(asked, std::memory_order_relaxed);
    return true;
}

}  // namespace nvfp4

// Which of the compiled instruction sets runs. Each <op>/cpu.cpp is compiled once for each of them, in a namespace of that
// name (NVFP4_ISA); NVFP4_CALL picks one at run time.
#pragma once

namespace nvfp4 {

enum class Isa { scalar, neon, avx2, avx512, avx512bf16 };

// The best this CPU can run, or what NVFP4_CPU_ISA or set_isa asked for, if the CPU has it.
Isa isa();
const char* isa_name();
// False, and no change, for a name that is unknown or that this CPU cannot run.
bool set_isa(const char* name);
bool isa_available(Isa isa);
// Whether matmul in fp32 is faster than MKL's, which on AMD's processors leaves half of a vector of AVX-512 unused.
bool outruns_mkl();

}  // namespace nvfp4

#if defined(NVFP4_X86)
#define NVFP4_CALL(function, params)                                            \
    (isa() == Isa::scalar ? scalar::function(params)                            \
     : isa() == Isa::avx2 ? avx2::function(params)                              \
                          : avx512::function(params))
// For ops that are compiled for avx512bf16 as well.
#define NVFP4_CALL_BF16(function, params) (isa() == Isa::avx512bf16 ? avx512bf16::function(params) : NVFP4_CALL(function, params))
#elif defined(NVFP4_ARM64)
#define NVFP4_CALL(function, params) (isa() == Isa::scalar ? scalar::function(params) : neon::function(params))
#define NVFP4_CALL_BF16(function, params) NVFP4_CALL(function, params)
#else
#define NVFP4_CALL(function, params) scalar::function(params)
#define NVFP4_CALL_BF16(function, params) scalar::function(params)
#endif

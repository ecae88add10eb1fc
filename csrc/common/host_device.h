// Marks for code that both ends compile: nvcc for the device, the host compiler for the CPU kernels.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FN_HD __host__ __device__ __forceinline__
#else
// Forced, so that a formula takes on the instruction set of the CPU kernel it is inlined into.
#define FN_HD inline __attribute__((always_inline))
#endif

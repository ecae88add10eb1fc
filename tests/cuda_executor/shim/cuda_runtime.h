// Stands in for the CUDA runtime when kernels are compiled with g++: the part of it that kernels here use.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <type_traits>

#include "../executor.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// --- host side -------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_executor {
inline std::string last_error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? cuda_executor::last_error.c_str() : "invalid configuration argument";
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const size_t threads = size_t(block.x) * block.y * block.z;
  const bool empty = size_t(grid.x) * grid.y * grid.z * threads == 0;
  if (empty || threads > 1024 || block.z > 64 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  try {
    std::tuple<Params...> params(std::forward<Args>(args)...);
    cuda_executor::executor().launch(grid, block, config->dynamicSmemBytes, [&] { std::apply(kernel, params); });
  } catch (const std::exception& error) {
    cuda_executor::last_error = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// --- device side: barriers and warp collectives ----------------------------------------------------------------------

inline void __syncthreads() { cuda_executor::executor().block_barrier(); }
inline int __syncthreads_count(int predicate) { return cuda_executor::executor().block_barrier(predicate != 0); }
inline void __threadfence() {}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_executor::executor().collective(cuda_executor::Collective::barrier, mask, 0);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return unsigned(cuda_executor::executor().collective(cuda_executor::Collective::ballot, mask, predicate != 0));
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

namespace cuda_executor {

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "CUDA shuffles numbers of at most eight bytes");
  uint64_t payload = 0;
  std::memcpy(&payload, &value, sizeof(T));
  payload = executor().collective(Collective::shuffle, mask, payload, source);
  std::memcpy(&value, &payload, sizeof(T));
  return value;
}

// A lane that would read past its segment of `width` lanes reads itself.
template <class T>
T shuffle_within(unsigned mask, T value, int source, int width) {
  const int lane = int(executor().lane());
  const bool inside = source >= 0 && source / width == lane / width;
  return shuffle(mask, value, unsigned(inside ? source : lane));
}

}  // namespace cuda_executor

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const unsigned lane = cuda_executor::executor().lane();
  return cuda_executor::shuffle(mask, value, lane / width * width + unsigned(source) % width);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return cuda_executor::shuffle_within(mask, value, int(cuda_executor::executor().lane()) - int(delta), width);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return cuda_executor::shuffle_within(mask, value, int(cuda_executor::executor().lane() + delta), width);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  return cuda_executor::shuffle_within(mask, value, int(cuda_executor::executor().lane()) ^ lanes, width);
}

// --- device side: atomics (fibers change only at barriers, so plain code is atomic) ----------------------------------

template <class T, class F>
T cuda_executor_exchange(T* address, F update) {
  const T old = *address;
  *address = update(old);
  return old;
}

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return cuda_executor_exchange(address, [=](T old) { return T(old + value); });
}

template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return cuda_executor_exchange(address, [=](T old) { return std::max(old, value); });
}

template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return cuda_executor_exchange(address, [=](T old) { return std::min(old, value); });
}

template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return cuda_executor_exchange(address, [=](T) { return value; });
}

template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return cuda_executor_exchange(address, [=](T old) { return old == expected ? value : old; });
}

// --- device side: numbers --------------------------------------------------------------------------------------------

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using std::max;
using std::min;

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
T __ldcs(const T* address) {
  return *address;
}

template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

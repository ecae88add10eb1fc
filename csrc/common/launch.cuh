// The one way to launch a kernel, and the one way to declare shared memory. Nothing else may: the same file is compiled
// by nvcc and, for tests on a machine without a GPU, by g++ with tests/cuda_executor standing in for the CUDA runtime.
//
//   FN_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)   throws std::runtime_error that names the kernel
//   FN_SHARED(type, name)                                           static shared memory; type may be an array,
//   float[32] FN_DYNAMIC_SHARED(type, name)                                   the launch's shared_bytes as a pointer to
//   type
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace fastnuggets {

inline void check_launch(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next, innocent call would report it
  throw std::runtime_error(std::string("fastnuggets: kernel ") + kernel + ": " + cudaGetErrorString(error));
}

// The hardware refuses a grid without blocks; an empty batch is not an error.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  if (shared_bytes > kDefaultSharedBytes) {
    check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check_launch(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

}  // namespace fastnuggets

#define FN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::fastnuggets::launch(#kernel, &kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#ifdef __CUDACC__
#define FN_SHARED(type, name) __shared__ std::remove_const_t<type> name
#define FN_DYNAMIC_SHARED(type, name)                           \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#endif

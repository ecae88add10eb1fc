// CUDA kernels of Poisson blending, as poisson_cuda.cpp (and a test on a machine without a GPU) calls them. All memory
// is the device's, the table too; the structs are copied. Calls are asynchronous on `stream`, allocate and upload
// nothing, and can be captured in a graph: launches depend on max_h and max_w, never on the table.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "blend/poisson.h"

namespace fastnuggets::poisson::cuda {

// Shared memory that a block may have. Results depend on it within the tolerance: it decides which objects are solved
// by one block. At least kLeastShared.
using Shared = int;
constexpr Shared kLeastShared = 4096;

// As many bytes as the function beside says, or fewer: objects then come in groups, of one at least.
struct Scratch {
  void* data;
  std::size_t bytes;
};

std::size_t scratch_bytes(const Blend& how, Shared shared);
void blend(const Blend& how, Shared shared, Scratch scratch, cudaStream_t stream);

std::size_t scratch_bytes(const BlendBackward& how, Shared shared);
void blend_backward(const BlendBackward& how, Shared shared, Scratch scratch, cudaStream_t stream);

}  // namespace fastnuggets::poisson::cuda

// CUDA kernels of compositing, as composite_cuda.cpp (and a test on a machine without a GPU) calls them. All memory is
// the device's; the structs are copied. Calls are asynchronous on `stream`, allocate and upload nothing, and can be
// captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "blend/composite.h"

namespace fastnuggets::composite::cuda {

// Scratch of as many bytes as the function beside says. The host does not know where objects lie: in the backward pass
// of objects that are laid by matrices each may cover its image.
std::size_t scratch_bytes(const Composite& how);
void composite(const Composite& how, void* scratch, cudaStream_t stream);

std::size_t scratch_bytes(const CompositeBackward& how);
void composite_backward(const CompositeBackward& how, void* scratch, cudaStream_t stream);

}  // namespace fastnuggets::composite::cuda

// What every family's X_cuda.cpp needs beside its launchers. ATen/cuda/CUDAContext.h is not here: it drags the headers
// of CUDA's libraries along.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstddef>

namespace fastnuggets {

// Memory of the caching allocator on like's device: made without synchronising, and part of a graph that is captured.
inline at::Tensor scratch(std::size_t bytes, const at::Tensor& like) {
  return at::empty({int64_t(bytes)}, like.options().dtype(at::kByte));
}

}  // namespace fastnuggets

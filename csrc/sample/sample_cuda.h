// CUDA kernels of sampling, as sample_cuda.cpp (and a test on a machine without a GPU) calls them. All memory is the
// device's; the structs are copied. Calls are asynchronous on `stream`, allocate and upload nothing, and can be
// captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "sample/sample.h"

namespace fastnuggets::sample::cuda {

// As many bytes as the function beside says; of a row's worth or more, fewer do for gumbel_softmax.
struct Scratch {
  void* data;
  std::size_t bytes;
};

void scaled_noise(const ScaledNoise& how, cudaStream_t stream);

std::size_t scratch_bytes(const Normal& how);
void normal(const Normal& how, Scratch scratch, cudaStream_t stream);

void normal_backward(const NormalBackward& how, cudaStream_t stream);

std::size_t scratch_bytes(const GumbelSoftmax& how);
void gumbel_softmax(const GumbelSoftmax& how, Scratch scratch, cudaStream_t stream);

void gumbel_softmax_backward(const GumbelSoftmaxBackward& how, cudaStream_t stream);

std::size_t scratch_bytes(const LogUniform& how);
void log_uniform(const LogUniform& how, Scratch scratch, cudaStream_t stream);

}  // namespace fastnuggets::sample::cuda

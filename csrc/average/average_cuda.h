// CUDA kernels of the averages, as average_cuda.cpp (and a test on a machine without a GPU) calls them. `Rows` lies in
// the host's memory and may go when a call returns; the tensors that it points to, and `Scalars::device`, are the
// device's. Calls are asynchronous on `stream`, allocate and upload nothing, and can be captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "average/average.h"

namespace fastnuggets::average::cuda {

void update(const Rows& rows, const Update& how, cudaStream_t stream);
void swag(const Rows& rows, const Swag& how, cudaStream_t stream);
void sample(const Rows& rows, const Sample& how, cudaStream_t stream);
void weighted_sum(const Rows& rows, const WeightedSum& how, cudaStream_t stream);
void swap(const Rows& rows, cudaStream_t stream);
// found [1] on the device: becomes the first row with an inf or a NaN, unless it is less already.
void first_nonfinite(const Rows& rows, long long* found, cudaStream_t stream);
void sgd(const Rows& rows, const Sgd& how, cudaStream_t stream);
void adamw(const Rows& rows, const AdamW& how, cudaStream_t stream);

}  // namespace fastnuggets::average::cuda

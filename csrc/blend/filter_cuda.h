// CUDA kernels of filters, as filter_cuda.cpp (and a test on a machine without a GPU) calls them. All memory is the
// device's; the structs are copied. Calls are asynchronous on `stream`, allocate and upload nothing, and can be
// captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "blend/filter.h"

namespace fastnuggets::filter::cuda {

void taps(const FilterTaps& how, cudaStream_t stream);
void step(const PyramidStep& how, cudaStream_t stream);
void multiband(const Multiband& how, cudaStream_t stream);
void multiband_backward(const MultibandBackward& how, cudaStream_t stream);

}  // namespace fastnuggets::filter::cuda

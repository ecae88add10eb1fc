// CUDA kernels of the search, as screen_cuda.cpp (and a test on a machine without a GPU) calls them. All pointers are
// the device's, rows are aligned to words. Asynchronous on `stream`; can be captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "screen/screen.h"

namespace fastnuggets::screen::cuda {

std::size_t scratch_bytes(const Search& how);
// how.k at most kMostOnDevice.
void search(const Search& how, void* scratch, cudaStream_t stream);

}  // namespace fastnuggets::screen::cuda

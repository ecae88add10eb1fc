// CUDA kernel of fit_atoms, as fit_cuda.cpp (and a test on a machine without a GPU) calls it: raw device pointers, the
// call is asynchronous on `stream` and allocates nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "voxelize/fit.h"

namespace fastnuggets::cuda {

// Doubles of workspace that one grid with so many atoms needs.
template <class T>
std::int64_t fit_workspace(std::int64_t atoms);

// offsets [G]: where in `workspace` each grid's part begins. All pointers, those of `problems` too, are the device's.
template <class T>
void fit_atoms(const fit::Problems<T>& problems, const std::int64_t* offsets, double* workspace, cudaStream_t stream);

}  // namespace fastnuggets::cuda

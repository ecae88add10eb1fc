// CUDA kernels of voxelize, as voxelize_cuda.cpp (and a test on a machine without a GPU) calls them: raw device
// pointers, every call is asynchronous on `stream`, allocates nothing and may be captured in a CUDA graph.
//
// T is float or double to compute values, Dual of one of them to compute derivatives along `tangent`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "voxelize/dual.h"
#include "voxelize/voxelize.h"

namespace fastnuggets::cuda {

enum class Dtype : int { float32, float64, float16, bfloat16 };

template <class T>
struct CudaJob {
  Molecules<Real<T>> m;
  Tangent<Real<T>> tangent;
  Grid grid;
  void* workspace;  // workspace_bytes<T>(m), 16-byte aligned, uninitialized
  cudaStream_t stream;
};

template <class T>
std::size_t workspace_bytes(const Molecules<Real<T>>& m);

// Writes every element of out [G, C, D, H, W] once.
template <class T>
void voxelize_forward(const CudaJob<T>& job, void* out, Dtype dtype);

// Writes all of to.coords, and of the others what is an entry. grad [G, C, D, H, W].
template <class T>
void voxelize_backward(const CudaJob<T>& job, const void* grad, Dtype dtype, const Gradients<Real<T>>& to);

// The voxels that are not zero, in the order of their place in [G, C, D, H, W]. First count them by tile, then, given
// for each tile how many precede it, write their places [5, total] (g, c, d, h, w) and values [total].
std::int64_t sparse_tiles(std::int64_t grids, std::int64_t channels, const Grid& grid);
template <class R>
void voxelize_sparse_count(const CudaJob<R>& job, std::int64_t* counts);  // [sparse_tiles]
template <class R>
void voxelize_sparse_write(const CudaJob<R>& job, const std::int64_t* before, std::int64_t total, std::int64_t* places,
                           R* values);

// out[s, j] = sum of x[i, j] over ptr[s] <= i < ptr[s + 1]; x [N, width], out [segments, width].
template <class R>
void segment_sum(const R* x, const std::int64_t* ptr, std::int64_t segments, std::int64_t width, R* out,
                 cudaStream_t stream);
// out[i, j] = y[segment of i, j]; y [segments, width], out [N, width].
template <class R>
void segment_expand(const R* y, const std::int64_t* ptr, std::int64_t segments, std::int64_t N, std::int64_t width,
                    R* out, cudaStream_t stream);

}  // namespace fastnuggets::cuda

// CUDA glue of voxelize: checks, allocation, the current stream. Nothing synchronises but voxelize_sparse, which must
// learn how many voxels are filled; what only the data can tell (ptr, channels, NaN) is not checked here.
#include "voxelize/voxelize_cuda.h"

#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>

#include "common/cuda_glue.h"
#include "voxelize/voxelize_args.h"

namespace fastnuggets {
namespace {

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

cuda::Dtype dtype_of(const at::Tensor& grid) {
  switch (grid.scalar_type()) {
    case at::kFloat:
      return cuda::Dtype::float32;
    case at::kDouble:
      return cuda::Dtype::float64;
    case at::kHalf:
      return cuda::Dtype::float16;
    default:
      return cuda::Dtype::bfloat16;
  }
}

template <class Body>
void for_type(const at::Tensor& coords, Body body) {
  coords.scalar_type() == at::kDouble ? body(double()) : body(float());
}

// A job and the memory that it needs until its kernels have been launched.
template <class T>
struct Job : cuda::CudaJob<T> {
  at::Tensor memory;

  Job(const MoleculeTensors& t, const Grid& grid, const Tangent<Real<T>>& tangent = {})
      : cuda::CudaJob<T>{t.view<Real<T>>(), tangent, grid, nullptr, c10::cuda::getCurrentCUDAStream()},
        memory(scratch(cuda::workspace_bytes<T>(this->m), t.coords)) {
    this->workspace = memory.mutable_data_ptr();
  }
};

void fill(const at::Tensor& out, const MoleculeTensors& t, const Grid& grid) {
  for_type(t.coords, [&]<class R>(R) {
    const Job<R> job(t, grid);
    cuda::voxelize_forward(job, out.mutable_data_ptr(), dtype_of(out));
  });
}

at::Tensor voxelize_cuda(FN_MOLECULES, FN_POSE, at::IntArrayRef shape, FN_RULE, at::ScalarType dtype) {
  check_new_grid(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing, density,
                 combine, cutoff, dtype);
  const c10::cuda::CUDAGuard device(coords.device());
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega, center, rotation, translation);
  const at::Tensor out =
      at::empty({t.grids(), t.channels(), shape[0], shape[1], shape[2]}, coords.options().dtype(dtype));
  fill(out, t, make_grid(Pass::value, shape, spacing, density, combine, cutoff));
  return out;
}

void voxelize_into_cuda(at::Tensor& out, FN_MOLECULES, FN_POSE, FN_RULE, const OptionalTensor& filled) {
  check_into(out, coords, ptr, channel, weight, size, omega, center, rotation, translation, spacing, density, combine,
             cutoff, filled);
  const c10::cuda::CUDAGuard device(coords.device());
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega, center, rotation, translation);
  fill(out, t, make_grid(Pass::value, out.sizes().slice(2), spacing, density, combine, cutoff));
}

std::tuple<at::Tensor, at::Tensor> voxelize_sparse_cuda(FN_MOLECULES, FN_POSE, at::IntArrayRef shape, FN_RULE,
                                                        at::ScalarType dtype) {
  check_new_grid(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing, density,
                 combine, cutoff, dtype);
  const c10::cuda::CUDAGuard device(coords.device());
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega, center, rotation, translation);
  const Grid grid = make_grid(Pass::value, shape, spacing, density, combine, cutoff);
  const at::Tensor counts = at::empty({cuda::sparse_tiles(t.grids(), t.channels(), grid)}, ptr.options());
  at::Tensor indices, values;
  for_type(coords, [&]<class R>(R) {
    const Job<R> job(t, grid);
    cuda::voxelize_sparse_count(job, counts.mutable_data_ptr<int64_t>());
    const at::Tensor ends = at::cumsum(counts, 0);
    const int64_t total = ends.numel() == 0 ? 0 : ends.select(0, -1).item<int64_t>();
    indices = at::empty({5, total}, ptr.options());
    values = at::empty({total}, coords.options());
    const at::Tensor before = ends.sub(counts);
    cuda::voxelize_sparse_write(job, before.const_data_ptr<int64_t>(), total, indices.mutable_data_ptr<int64_t>(),
                                values.mutable_data_ptr<R>());
  });
  return {indices, values.to(dtype)};
}

// A gradient that is wanted, or an empty tensor. What is not an entry stays zero.
at::Tensor new_gradient(bool wanted, at::IntArrayRef sizes, const at::Tensor& like) {
  return wanted ? at::zeros(sizes, like.options()) : at::empty({0}, like.options());
}

std::array<at::Tensor, 4> new_gradients(const std::array<bool, 4>& wanted, const MoleculeTensors& t) {
  const at::IntArrayRef entries = t.weight.sizes();
  return {new_gradient(wanted[0], t.coords.sizes(), t.coords), new_gradient(wanted[1], entries, t.coords),
          new_gradient(wanted[2], entries, t.coords), new_gradient(wanted[3], entries, t.coords)};
}

template <class R>
Gradients<R> pointers(const std::array<bool, 4>& wanted, const std::array<at::Tensor, 4>& to) {
  const auto data = [&](int i) { return wanted[i] ? to[i].mutable_data_ptr<R>() : nullptr; };
  return {data(0), data(1), data(2), data(3)};
}

Four voxelize_backward_cuda(const at::Tensor& grad, FN_MOLECULES, FN_RULE, std::array<bool, 4> wanted) {
  check_backward(grad, coords, ptr, channel, weight, size, omega, spacing, density, combine, cutoff);
  const c10::cuda::CUDAGuard device(coords.device());
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega);
  const at::Tensor g = grad.contiguous();
  const auto to = new_gradients(wanted, t);
  for_type(coords, [&]<class R>(R) {
    const Job<R> job(t, make_grid(Pass::slope, g.sizes().slice(2), spacing, density, combine, cutoff));
    cuda::voxelize_backward(job, g.const_data_ptr(), dtype_of(g), pointers<R>(wanted, to));
  });
  return {to[0], to[1], to[2], to[3]};
}

Five voxelize_double_backward_cuda(const OptionalTensor& position_tangent, const OptionalTensor& weight_tangent,
                                   const OptionalTensor& size_tangent, const OptionalTensor& omega_tangent,
                                   const at::Tensor& grad, FN_MOLECULES, FN_RULE) {
  check_backward(grad, coords, ptr, channel, weight, size, omega, spacing, density, combine, cutoff);
  const c10::cuda::CUDAGuard device(coords.device());
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega);
  const std::array<OptionalTensor, 4> along = {
      MoleculeTensors::contiguous(position_tangent), MoleculeTensors::contiguous(weight_tangent),
      MoleculeTensors::contiguous(size_tangent), MoleculeTensors::contiguous(omega_tangent)};
  const at::Tensor g = grad.contiguous();
  const at::Tensor by_grid = at::empty(g.sizes(), g.options());
  constexpr std::array<bool, 4> all = {true, true, true, true};
  const auto to = new_gradients(all, t);
  for_type(coords, [&]<class R>(R) {
    const Tangent<R> tangent{data_or_null<R>(along[0]), data_or_null<R>(along[1]), data_or_null<R>(along[2]),
                             data_or_null<R>(along[3])};
    const Job<Dual<R>> job(t, make_grid(Pass::slope, g.sizes().slice(2), spacing, density, combine, cutoff), tangent);
    cuda::voxelize_forward(job, by_grid.mutable_data_ptr(), dtype_of(by_grid));
    cuda::voxelize_backward(job, g.const_data_ptr(), dtype_of(g), pointers<R>(all, to));
  });
  return {by_grid, to[0], to[1], to[2], to[3]};
}

at::Tensor segment_sum_cuda(const at::Tensor& x, const at::Tensor& ptr) {
  check_segments("x", x, ptr);
  const c10::cuda::CUDAGuard device(x.device());
  const at::Tensor from = x.contiguous(), bounds = ptr.contiguous();
  const at::Tensor out = at::empty({ptr.size(0) - 1, x.size(1)}, x.options());
  for_type(x, [&]<class R>(R) {
    cuda::segment_sum(from.const_data_ptr<R>(), bounds.const_data_ptr<int64_t>(), out.size(0), out.size(1),
                      out.mutable_data_ptr<R>(), c10::cuda::getCurrentCUDAStream());
  });
  return out;
}

at::Tensor segment_expand_cuda(const at::Tensor& y, const at::Tensor& ptr, int64_t n) {
  check_expansion(y, ptr);
  const c10::cuda::CUDAGuard device(y.device());
  const at::Tensor from = y.contiguous(), bounds = ptr.contiguous();
  const at::Tensor out = at::empty({n, y.size(1)}, y.options());
  for_type(y, [&]<class R>(R) {
    cuda::segment_expand(from.const_data_ptr<R>(), bounds.const_data_ptr<int64_t>(), y.size(0), n, y.size(1),
                         out.mutable_data_ptr<R>(), c10::cuda::getCurrentCUDAStream());
  });
  return out;
}

}  // namespace
}  // namespace fastnuggets

TORCH_LIBRARY_IMPL(fastnuggets, CUDA, m) {
  m.impl("voxelize", &fastnuggets::voxelize_cuda);
  m.impl("voxelize_", &fastnuggets::voxelize_into_cuda);
  m.impl("voxelize_sparse", &fastnuggets::voxelize_sparse_cuda);
  m.impl("voxelize_backward", &fastnuggets::voxelize_backward_cuda);
  m.impl("voxelize_double_backward", &fastnuggets::voxelize_double_backward_cuda);
  m.impl("segment_sum", &fastnuggets::segment_sum_cuda);
  m.impl("segment_expand", &fastnuggets::segment_expand_cuda);
}

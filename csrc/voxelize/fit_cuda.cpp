// CUDA glue of fit_atoms: workspace by the size of each grid's problem, which the host has to know.
#include "voxelize/fit_cuda.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "voxelize/fit_op.h"

namespace fastnuggets::fit {
namespace {

template <class T>
void fit(const FitArgs& args) {
  const std::int64_t grids = args.grid.size(0);
  const at::Tensor offsets = at::empty({grids}, args.host_ptr.options());
  const std::int64_t* ptr = args.host_ptr.const_data_ptr<std::int64_t>();
  std::int64_t total = 0;
  for (std::int64_t g = 0; g < grids; ++g) {
    offsets.mutable_data_ptr<std::int64_t>()[g] = total;
    total += cuda::fit_workspace<T>(ptr[g + 1] - ptr[g]);
  }
  const at::Tensor workspace = at::empty({total}, args.grid.options().dtype(at::kDouble));
  const at::Tensor device_offsets = offsets.to(args.grid.device());
  cuda::fit_atoms(args.problems<T>(), device_offsets.const_data_ptr<std::int64_t>(),
                  workspace.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream());
}

std::tuple<at::Tensor, at::Tensor> fit_atoms_cuda(FN_FIT_ATOMS) {
  const c10::cuda::CUDAGuard device(grid.device());
  const FitArgs args(grid, positions, amplitudes, ptr, sigma, omega, spacing, cutoff, iterations);
  if (args.grid.scalar_type() == at::kDouble)
    fit<double>(args);
  else
    fit<float>(args);
  return {args.positions, args.amplitudes};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnuggets, CUDA, m) { m.impl("fit_atoms", fit_atoms_cuda); }

}  // namespace fastnuggets::fit

// What the CPU and the CUDA end of fit_atoms share on the host: checked, contiguous arguments and the outputs.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "voxelize/fit.h"

// The arguments in the order of the schema; shapes are in fit.h.
#define FN_FIT_ATOMS                                                                                        \
  const at::Tensor &grid, const at::Tensor &positions, const at::Tensor &amplitudes, const at::Tensor &ptr, \
      const at::Tensor &sigma, const at::Tensor &omega, at::ArrayRef<double> spacing, double cutoff,        \
      std::int64_t iterations

namespace fastnuggets::fit {

struct FitArgs {
  at::Tensor grid, ptr, sigma, omega;
  at::Tensor host_ptr;               // ptr on the CPU: reading it synchronises with a GPU
  at::Tensor positions, amplitudes;  // copies of the start; the kernel moves them
  double spacing[3];
  double cutoff;
  std::int64_t iterations;

  explicit FitArgs(FN_FIT_ATOMS);

  template <class T>
  Problems<T> problems() const {
    return {grid.const_data_ptr<T>(),
            sigma.const_data_ptr<T>(),
            omega.const_data_ptr<T>(),
            ptr.const_data_ptr<std::int64_t>(),
            positions.mutable_data_ptr<T>(),
            amplitudes.mutable_data_ptr<T>(),
            grid.size(0),
            {grid.size(1), grid.size(2), grid.size(3)},
            {spacing[0], spacing[1], spacing[2]},
            cutoff,
            int(iterations)};
  }
};

}  // namespace fastnuggets::fit

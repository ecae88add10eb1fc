// Schema, checks and Autocast of fit_atoms. It has no derivative: the fit ends where the gradient is zero.
#include "voxelize/fit_op.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>

#include "common/op.h"

namespace fastnuggets::fit {
namespace {

// Shape letters are those of fit.h.
at::Tensor like_grid(const at::Tensor& values, const at::Tensor& grid, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(values.sizes() == shape, "fit_atoms: ", name, " must be ", shape, ", got ", values.sizes());
  TORCH_CHECK_TYPE(values.scalar_type() == grid.scalar_type(), "fit_atoms: ", name, " must be ", grid.scalar_type(),
                   " like grid, got ", values.scalar_type());
  TORCH_CHECK_VALUE(values.device() == grid.device(), "fit_atoms: ", name, " must be on ", grid.device(),
                    " like grid, got ", values.device());
  return values.contiguous();
}

}  // namespace

FitArgs::FitArgs(FN_FIT_ATOMS) : grid(grid.contiguous()), cutoff(cutoff), iterations(iterations) {
  const auto dtype = grid.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "fit_atoms: grid must be float32 or float64, got ",
                   dtype);
  TORCH_CHECK_VALUE(grid.dim() == 4, "fit_atoms: grid must be [G, D, H, W], got ", grid.sizes());
  const std::int64_t grids = grid.size(0), atoms = positions.dim() == 0 ? 0 : positions.size(0);
  this->positions = like_grid(positions, grid, "positions", {atoms, 3}).clone();
  this->amplitudes = like_grid(amplitudes, grid, "amplitudes", {atoms}).clone();
  this->sigma = like_grid(sigma, grid, "sigma", {grids});
  this->omega = like_grid(omega, grid, "omega", {grids});
  TORCH_CHECK_TYPE(ptr.scalar_type() == at::kLong, "fit_atoms: ptr must be int64, got ", ptr.scalar_type());
  TORCH_CHECK_VALUE(ptr.dim() == 1 && ptr.size(0) == grids + 1, "fit_atoms: ptr must be [G + 1 = ", grids + 1,
                    "], got ", ptr.sizes());
  TORCH_CHECK_VALUE(ptr.device() == grid.device(), "fit_atoms: ptr must be on ", grid.device(), " like grid, got ",
                    ptr.device());
  this->ptr = ptr.contiguous();
  host_ptr = this->ptr.cpu();
  const std::int64_t* p = host_ptr.const_data_ptr<std::int64_t>();
  TORCH_CHECK_VALUE(std::is_sorted(p, p + grids + 1) && p[0] == 0 && p[grids] == atoms,
                    "fit_atoms: ptr must ascend from 0 to the number of atoms, ", atoms);
  TORCH_CHECK_VALUE(spacing.size() == 3 && *std::min_element(spacing.begin(), spacing.end()) > 0,
                    "fit_atoms: spacing must be three numbers above 0, got ", spacing);
  std::copy(spacing.begin(), spacing.end(), this->spacing);
  TORCH_CHECK_VALUE(cutoff > 0 && cutoff < 1, "fit_atoms: cutoff must be in (0, 1), got ", cutoff);
  TORCH_CHECK_VALUE(iterations >= 0, "fit_atoms: iterations must not be negative, got ", iterations);
}

namespace {

std::tuple<at::Tensor, at::Tensor> fit_atoms_autocast(FN_FIT_ATOMS) {
  static const auto op = typed<decltype(fit_atoms_autocast)>("fastnuggets::fit_atoms");
  const AutocastOff off(grid);
  return op.call(full(grid), full(positions), full(amplitudes), ptr, full(sigma), full(omega), spacing, cutoff,
                 iterations);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnuggets, m) {
  m.def(
      "fit_atoms(Tensor grid, Tensor positions, Tensor amplitudes, Tensor ptr, Tensor sigma, Tensor omega, "
      "float[3] spacing, float cutoff, int iterations) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fastnuggets, Autograd, m) { m.impl("fit_atoms", torch::autograd::autogradNotImplementedFallback()); }
TORCH_LIBRARY_IMPL(fastnuggets, AutocastCPU, m) { m.impl("fit_atoms", fit_atoms_autocast); }
TORCH_LIBRARY_IMPL(fastnuggets, AutocastCUDA, m) { m.impl("fit_atoms", fit_atoms_autocast); }

}  // namespace fastnuggets::fit

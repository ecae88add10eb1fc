// Schemas, checks and Autocast of fit_atoms and of the filter that finds its seeds. They have no derivative.
#include "voxelize/fit_op.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/fft_irfftn.h>
#include <ATen/ops/fft_rfftn.h>
#include <ATen/ops/view_as_real.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "common/op.h"

// MKL's own function, in the library that torch brings; null where torch has another library for transforms.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

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

// MKL plans, and so rounds, a transform by the number of threads it may use. Here the parts are shared out among
// threads, and a transform has one.
class OneMklThread {
 public:
  OneMklThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneMklThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  OneMklThread(const OneMklThread&) = delete;
  OneMklThread& operator=(const OneMklThread&) = delete;

 private:
  int before_;
};

at::Tensor filtered(const at::Tensor& grid, const at::Tensor& gain, at::IntArrayRef size) {
  constexpr std::int64_t kAxes[] = {1, 2, 3};
  const at::Tensor spectrum = at::fft_rfftn(grid, size, kAxes);
  at::view_as_real(spectrum).mul_(gain.unsqueeze(-1));
  at::Tensor result = at::fft_irfftn(spectrum, size, kAxes);
  for (const std::int64_t axis : kAxes) result = result.narrow(axis, 0, grid.size(axis));
  return result;
}

// grid [G, D, H, W], zero-padded to `size`, with its transform multiplied by gain [size 0, size 1, size 2 / 2 + 1].
at::Tensor filter_grids(const at::Tensor& grid, const at::Tensor& gain, at::IntArrayRef size) {
  TORCH_CHECK_VALUE(grid.dim() == 4, "filter_grids: grid must be [G, D, H, W], got ", grid.sizes());
  for (int i = 0; i < 3; ++i)
    TORCH_CHECK_VALUE(size[i] >= grid.size(i + 1), "filter_grids: size must hold ", grid.sizes(), ", got ", size);
  const std::array<std::int64_t, 3> half{size[0], size[1], size[2] / 2 + 1};
  TORCH_CHECK_VALUE(gain.sizes() == at::IntArrayRef(half), "filter_grids: gain must be ", at::IntArrayRef(half),
                    ", got ", gain.sizes());
  TORCH_CHECK_TYPE(gain.scalar_type() == grid.scalar_type(), "filter_grids: gain must be ", grid.scalar_type(),
                   " like grid, got ", gain.scalar_type());
  const at::Tensor out = at::empty(grid.sizes(), grid.options());
  if (grid.numel() == 0) return out;
  if (!grid.is_cpu()) return out.copy_(filtered(grid, gain, size));
  constexpr std::int64_t kPart = 4;
  const std::int64_t grids = grid.size(0), parts = (grids + kPart - 1) / kPart;
  at::parallel_for(0, parts, 1, [&](std::int64_t first, std::int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const OneMklThread one_thread;
    for (std::int64_t part = first; part < last; ++part) {
      const std::int64_t start = part * kPart, count = std::min(kPart, grids - start);
      out.narrow(0, start, count).copy_(filtered(grid.narrow(0, start, count), gain, size));
    }
  });
  return out;
}

at::Tensor filter_grids_autocast(const at::Tensor& grid, const at::Tensor& gain, at::IntArrayRef size) {
  static const auto op = typed<decltype(filter_grids)>("fastnuggets::filter_grids");
  const AutocastOff off(grid);
  return op.call(full(grid), full(gain), size);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnuggets, m) {
  m.def(
      "fit_atoms(Tensor grid, Tensor positions, Tensor amplitudes, Tensor ptr, Tensor sigma, Tensor omega, "
      "float[3] spacing, float cutoff, int iterations) -> (Tensor, Tensor)");
  m.def("filter_grids(Tensor grid, Tensor gain, int[3] size) -> Tensor");
}
TORCH_LIBRARY_IMPL(fastnuggets, CompositeExplicitAutograd, m) { m.impl("filter_grids", filter_grids); }
TORCH_LIBRARY_IMPL(fastnuggets, Autograd, m) {
  m.impl("fit_atoms", torch::autograd::autogradNotImplementedFallback());
  m.impl("filter_grids", torch::autograd::autogradNotImplementedFallback());
}
#define FN_AUTOCAST(KEY)                           \
  TORCH_LIBRARY_IMPL(fastnuggets, KEY, m) {        \
    m.impl("fit_atoms", fit_atoms_autocast);       \
    m.impl("filter_grids", filter_grids_autocast); \
  }
FN_AUTOCAST(AutocastCPU)
FN_AUTOCAST(AutocastCUDA)
#undef FN_AUTOCAST

}  // namespace fastnuggets::fit

// Schema, checks and autocast of the random walker.
#include "blend/walker_op.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>

#include "common/op.h"

namespace fastnuggets::walker {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;

#define FN_WALK                                                                                                    \
  const at::Tensor &east, const at::Tensor &south, const at::Tensor &seeds, std::int64_t labels, double tolerance, \
      std::int64_t max_steps

void check_weights(const char* name, const at::Tensor& t, const at::Tensor& seeds) {
  TORCH_CHECK_VALUE(t.sizes() == seeds.sizes(), "random_walker: ", name, " must be ", seeds.sizes(),
                    " like seeds, got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, "random_walker: ", name,
                   " must be float32 or float64, got ", t.scalar_type());
}

Two random_walker(FN_WALK) {
  TORCH_CHECK_VALUE(seeds.dim() == 2, "random_walker: seeds must be [H, W], got ", seeds.sizes());
  TORCH_CHECK_TYPE(seeds.scalar_type() == at::kLong, "random_walker: seeds must be int64, got ", seeds.scalar_type());
  check_weights("east", east, seeds);
  check_weights("south", south, seeds);
  TORCH_CHECK_TYPE(south.scalar_type() == east.scalar_type(), "random_walker: south must be ", east.scalar_type(),
                   " like east, got ", south.scalar_type());
  TORCH_CHECK_VALUE(labels >= 1, "random_walker: labels must be at least 1, got ", labels);
  TORCH_CHECK_VALUE(tolerance > 0, "random_walker: tolerance must be above 0, got ", tolerance);
  TORCH_CHECK_VALUE(max_steps >= 1, "random_walker: max_steps must be at least 1, got ", max_steps);
  const auto doubles = east.options().dtype(at::kDouble);
  const at::Tensor rightward = east.to(at::kDouble).contiguous(), downward = south.to(at::kDouble).contiguous();
  const at::Tensor marks = seeds.contiguous();
  const std::int64_t* const s = marks.const_data_ptr<std::int64_t>();
  TORCH_CHECK_VALUE(std::all_of(s, s + marks.numel(), [&](std::int64_t k) { return k >= 0 && k <= labels; }),
                    "random_walker: seeds must be from 0 to labels = ", labels);
  TORCH_CHECK_VALUE(marks.numel() == 0 || std::any_of(s, s + marks.numel(), [](std::int64_t k) { return k > 0; }),
                    "random_walker: seeds must mark at least one pixel");
  const at::Tensor found = at::empty({labels, seeds.size(0), seeds.size(1)}, doubles), error = at::empty({1}, doubles);
  *error.mutable_data_ptr<double>() = 0;
  if (marks.numel() > 0)
    kernels_on<Kernels>(seeds.device())
        .walk({rightward.const_data_ptr<double>(), downward.const_data_ptr<double>(), s, seeds.size(0), seeds.size(1),
               int(labels), tolerance, int(std::min<std::int64_t>(max_steps, 100000)), found.mutable_data_ptr<double>(),
               error.mutable_data_ptr<double>()});
  return {found.to(east.scalar_type()), error.to(east.scalar_type())};
}

Two random_walker_autocast(FN_WALK) {
  static const auto op = typed<decltype(random_walker_autocast)>("fastnuggets::random_walker");
  const AutocastOff off(east);
  return op.call(full(east), full(south), seeds, labels, tolerance, max_steps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnuggets, m) {
  m.def(
      "random_walker(Tensor east, Tensor south, Tensor seeds, int labels, float tolerance, int max_steps) "
      "-> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fastnuggets, CPU, m) { m.impl("random_walker", random_walker); }
TORCH_LIBRARY_IMPL(fastnuggets, Autograd, m) {
  m.impl("random_walker", torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(fastnuggets, AutocastCPU, m) { m.impl("random_walker", random_walker_autocast); }

}  // namespace fastnuggets::walker

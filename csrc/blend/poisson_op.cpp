// Schema, checks, autograd and autocast of Poisson blending. They must agree, so they share a file.
#include "blend/poisson_op.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <cmath>

#include "common/op.h"

namespace fastnuggets::poisson {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

#define FN_POISSON                                                                                         \
  const at::Tensor &background, const at::Tensor &pixels, const at::Tensor &mask, const at::Tensor &table, \
      std::int64_t max_h, std::int64_t max_w, std::int64_t guidance, bool soft, double tolerance,          \
      std::int64_t max_cycles, bool channels_last
#define FN_PASS_ON background, pixels, mask, table, max_h, max_w, guidance, soft, tolerance, max_cycles, channels_last

Two call_blend(FN_POISSON) {
  static const auto op = typed<decltype(call_blend)>("fastnuggets::poisson_blend");
  return op.call(FN_PASS_ON);
}
Three call_backward(const at::Tensor& grad, FN_POISSON, std::array<bool, 3> wanted) {
  static const auto op = typed<decltype(call_backward)>("fastnuggets::poisson_blend_backward");
  return op.call(grad, FN_PASS_ON, wanted);
}

void check_like(const char* name, const at::Tensor& t, std::int64_t numel, const at::Tensor& background) {
  TORCH_CHECK_VALUE(t.dim() == 1 && (numel < 0 || t.numel() == numel), "poisson_blend: ", name, " must be [",
                    numel < 0 ? "P" : std::to_string(numel), "], got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == background.scalar_type(), "poisson_blend: ", name, " must be ",
                   background.scalar_type(), " like background, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == background.device(), "poisson_blend: ", name, " must be on ", background.device(),
                    " like background, got ", t.device());
}

// Checked, dense arguments, kept alive.
struct Args {
  at::Tensor background, pixels, mask, table;
  Scene scene{};
  Effort effort{};

  explicit Args(FN_POISSON) {
    TORCH_CHECK_VALUE(background.dim() == 4, "poisson_blend: background must be [B, C, H, W] or [B, H, W, C], got ",
                      background.sizes());
    const at::ScalarType type = background.scalar_type();
    TORCH_CHECK_TYPE(type == at::kByte || type == at::kFloat || type == at::kDouble,
                     "poisson_blend: background must be uint8, float32 or float64, got ", type);
    scene.dtype = *dtype_of(type);
    check_like("mask", mask, -1, background);
    const auto size = [&](int axis, int last) { return background.size(channels_last ? last : axis); };
    scene.B = background.size(0);
    scene.C = size(1, 3);
    scene.H = size(2, 1);
    scene.W = size(3, 2);
    scene.P = mask.numel();
    check_like("pixels", pixels, scene.P * scene.C, background);
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == kTable, "poisson_blend: table must be [N, ", kTable,
                      "], got ", table.sizes());
    TORCH_CHECK_TYPE(table.scalar_type() == at::kLong, "poisson_blend: table must be int64, got ", table.scalar_type());
    TORCH_CHECK_VALUE(table.device() == background.device(), "poisson_blend: table must be on ", background.device(),
                      " like background, got ", table.device());
    TORCH_CHECK_VALUE(guidance >= 0 && guidance < kGuidances, "poisson_blend: guidance: no such number ", guidance);
    TORCH_CHECK_VALUE(max_h >= 0 && max_w >= 0, "poisson_blend: max_h and max_w must not be negative, got ", max_h,
                      " and ", max_w);
    TORCH_CHECK_VALUE(tolerance > 0, "poisson_blend: tolerance must be above 0, got ", tolerance);
    TORCH_CHECK_VALUE(max_cycles >= 1, "poisson_blend: max_cycles must be at least 1, got ", max_cycles);
    this->background = background.contiguous();
    this->pixels = pixels.contiguous();
    this->mask = mask.contiguous();
    this->table = table.contiguous();
    scene.background = this->background.const_data_ptr();
    scene.pixels = this->pixels.const_data_ptr();
    scene.mask = this->mask.const_data_ptr();
    scene.table = this->table.const_data_ptr<std::int64_t>();
    scene.channels_last = channels_last;
    scene.N = table.size(0);
    scene.max_h = max_h;
    scene.max_w = max_w;
    scene.guidance = Guidance(guidance);
    scene.soft = soft;
    effort = {float(tolerance), int(std::min<std::int64_t>(max_cycles, 1000))};
  }
};

Two poisson_blend(FN_POISSON) {
  const c10::OptionalDeviceGuard device(background.device());
  const Args args(FN_PASS_ON);
  const at::Tensor image = at::clone(background, at::MemoryFormat::Contiguous);
  const at::Tensor info = at::empty({args.scene.N}, background.options().dtype(at::kFloat));
  if (args.scene.N > 0)
    kernels_on<Kernels>(background.device())
        .blend({args.scene, args.effort, image.mutable_data_ptr(), info.mutable_data_ptr<float>()});
  return {image, info};
}

Three poisson_blend_backward(const at::Tensor& grad, FN_POISSON, std::array<bool, 3> wanted) {
  const c10::OptionalDeviceGuard device(background.device());
  const Args args(FN_PASS_ON);
  TORCH_CHECK_TYPE(args.scene.dtype != Dtype::uint8, "poisson_blend_backward: uint8 has no gradient");
  TORCH_CHECK_VALUE(grad.sizes() == background.sizes() && grad.device() == background.device(),
                    "poisson_blend_backward: grad must be ", background.sizes(), " on ", background.device(), ", got ",
                    grad.sizes(), " on ", grad.device());
  TORCH_CHECK_TYPE(grad.scalar_type() == background.scalar_type(), "poisson_blend_backward: grad must be ",
                   background.scalar_type(), " like background, got ", grad.scalar_type());
  const at::Tensor dense = grad.contiguous(), info = at::empty({args.scene.N}, grad.options().dtype(at::kFloat));
  const auto zeros = [&](const at::Tensor& like, bool needed) {
    return at::zeros({needed ? like.numel() : 0}, like.options());
  };
  const at::Tensor by_background =
      wanted[0] ? at::clone(grad, at::MemoryFormat::Contiguous) : at::empty({0}, grad.options());
  const at::Tensor by_pixels = zeros(pixels, wanted[1]), by_mask = zeros(mask, wanted[2]);
  const auto data = [](const at::Tensor& t, bool needed) { return needed ? t.mutable_data_ptr() : nullptr; };
  if (args.scene.N > 0)
    kernels_on<Kernels>(background.device())
        .blend_backward({args.scene, args.effort, dense.const_data_ptr(), data(by_background, wanted[0]),
                         data(by_pixels, wanted[1]), data(by_mask, wanted[2] && soft), info.mutable_data_ptr<float>()});
  if (info.is_cpu()) {  // elsewhere a look would synchronise
    const float* const errors = info.const_data_ptr<float>();
    for (std::int64_t n = 0; n < args.scene.N; ++n)
      TORCH_CHECK(!(errors[n] > args.effort.tolerance), "poisson_blend_backward: the gradient of object ", n,
                  " did not converge: error ", errors[n] / 255, " of its largest value after ", args.effort.max_cycles,
                  " cycles");
  }
  return {by_background, by_pixels, by_mask};
}

// ---- autograd

struct PoissonBlend : torch::autograd::Function<PoissonBlend> {
  static variable_list forward(AutogradContext* ctx, FN_POISSON) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({background, pixels, mask, table});
    ctx->saved_data["max_h"] = max_h;
    ctx->saved_data["max_w"] = max_w;
    ctx->saved_data["guidance"] = guidance;
    ctx->saved_data["soft"] = soft;
    ctx->saved_data["tolerance"] = tolerance;
    ctx->saved_data["max_cycles"] = max_cycles;
    ctx->saved_data["channels_last"] = channels_last;
    const auto [image, info] = call_blend(FN_PASS_ON);
    ctx->mark_non_differentiable({info});
    return {image, info};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const variable_list v = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    variable_list out(11);
    if (!grad[0].defined()) return out;
    const auto [a, b, c] = call_backward(grad[0], v[0], v[1], v[2], v[3], data["max_h"].toInt(), data["max_w"].toInt(),
                                         data["guidance"].toInt(), data["soft"].toBool(), data["tolerance"].toDouble(),
                                         data["max_cycles"].toInt(), data["channels_last"].toBool(), wanted);
    if (wanted[0]) out[0] = a;
    if (wanted[1]) out[1] = b;
    if (wanted[2]) out[2] = c;
    return out;
  }
};

Two poisson_blend_autograd(FN_POISSON) {
  refuse_forward_mode("poisson_blend", background, pixels, mask);
  if (records(background, pixels, mask)) {
    const variable_list out = PoissonBlend::apply(FN_PASS_ON);
    return {out[0], out[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_blend(FN_PASS_ON);
}

Two poisson_blend_autocast(FN_POISSON) {
  const AutocastOff off(background);
  return call_blend(full(background), full(pixels), full(mask), table, max_h, max_w, guidance, soft, tolerance,
                    max_cycles, channels_last);
}
Three poisson_blend_backward_autocast(const at::Tensor& grad, FN_POISSON, std::array<bool, 3> wanted) {
  const AutocastOff off(background);
  return call_backward(full(grad), full(background), full(pixels), full(mask), table, max_h, max_w, guidance, soft,
                       tolerance, max_cycles, channels_last, wanted);
}

}  // namespace

#define FN_SCHEMA                                                                                     \
  "Tensor background, Tensor pixels, Tensor mask, Tensor table, int max_h, int max_w, int guidance, " \
  "bool soft, float tolerance, int max_cycles, bool channels_last"

TORCH_LIBRARY_FRAGMENT(fastnuggets, m) {
  m.def("poisson_blend(" FN_SCHEMA ") -> (Tensor, Tensor)");
  m.def("poisson_blend_backward(Tensor grad, " FN_SCHEMA ", bool[3] wanted) -> (Tensor, Tensor, Tensor)");
}

#define FN_ON_DEVICE(KEY)                                     \
  TORCH_LIBRARY_IMPL(fastnuggets, KEY, m) {                   \
    m.impl("poisson_blend", poisson_blend);                   \
    m.impl("poisson_blend_backward", poisson_blend_backward); \
  }
FN_ON_DEVICE(CPU)
FN_ON_DEVICE(CUDA)
#undef FN_ON_DEVICE

TORCH_LIBRARY_IMPL(fastnuggets, Autograd, m) {
  m.impl("poisson_blend", poisson_blend_autograd);
  m.impl("poisson_blend_backward", torch::autograd::autogradNotImplementedFallback());
}
#define FN_AUTOCAST(KEY)                                               \
  TORCH_LIBRARY_IMPL(fastnuggets, KEY, m) {                            \
    m.impl("poisson_blend", poisson_blend_autocast);                   \
    m.impl("poisson_blend_backward", poisson_blend_backward_autocast); \
  }
FN_AUTOCAST(AutocastCPU)
FN_AUTOCAST(AutocastCUDA)
#undef FN_AUTOCAST

}  // namespace fastnuggets::poisson

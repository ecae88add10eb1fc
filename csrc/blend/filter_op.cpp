// Schemas, checks and autograd of filters. They must agree, so they share a file.
#include "blend/filter_op.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <vector>

#include "blend/filter_math.h"
#include "common/cpu.h"
#include "common/op.h"

namespace fastnuggets::filter {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

#define FN_TAPS                                                                                           \
  at::IntArrayRef taps, at::IntArrayRef ptr, at::IntArrayRef divisors, std::int64_t border, double value, \
      std::int64_t rounding, bool transposed, bool channels_last
#define FN_MULTIBAND                                                                                       \
  const at::Tensor &background, const at::Tensor &foreground, const at::Tensor &mask, std::int64_t levels, \
      bool channels_last

// ---- the registered ops, as C++ functions through the dispatcher

at::Tensor call_filter_taps(const at::Tensor& image, FN_TAPS) {
  static const auto op = typed<decltype(call_filter_taps)>("fastnuggets::filter_taps");
  return op.call(image, taps, ptr, divisors, border, value, rounding, transposed, channels_last);
}
at::Tensor call_pyramid_step(const at::Tensor& image, std::int64_t step, c10::SymInt h, c10::SymInt w) {
  static const auto op = typed<decltype(call_pyramid_step)>("fastnuggets::pyramid_step");
  return op.call(image, step, h, w);
}
at::Tensor call_multiband(FN_MULTIBAND) {
  static const auto op = typed<decltype(call_multiband)>("fastnuggets::multiband_blend");
  return op.call(background, foreground, mask, levels, channels_last);
}
Three call_multiband_backward(const at::Tensor& grad, FN_MULTIBAND, std::array<bool, 3> wanted) {
  static const auto op = typed<decltype(call_multiband_backward)>("fastnuggets::multiband_blend_backward");
  return op.call(grad, background, foreground, mask, levels, channels_last, wanted);
}

// ---- checks and the structs of filter.h; letters and meanings are there

const Kernels& kernels(const at::Tensor& t) { return kernels_on<Kernels>(t.device()); }

Dtype image_dtype(const char* op, const char* name, const at::Tensor& t) {
  const bool number = at::isFloatingType(t.scalar_type()) || t.scalar_type() == at::kByte;
  TORCH_CHECK_TYPE(number && dtype_of(t.scalar_type()), op, ": ", name,
                   " must be uint8, float32, float64, float16 or bfloat16, got ", t.scalar_type());
  return *dtype_of(t.scalar_type());
}

Layout layout_of(const char* op, const char* name, const at::Tensor& t, bool channels_last) {
  TORCH_CHECK_VALUE(t.dim() == 4, op, ": ", name, " must be ", channels_last ? "[B, H, W, C]" : "[B, C, H, W]",
                    ", got ", t.sizes());
  const auto s = t.sizes();
  return channels_last ? Layout{s[0], 1, s[1], s[2], s[3]} : Layout{s[0], s[1], s[2], s[3], 1};
}

void check_like(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef sizes, const at::Tensor& first) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, op, ": ", name, " must be ", sizes, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == first.scalar_type(), op, ": ", name, " must be ", first.scalar_type(),
                   " like the image, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == first.device(), op, ": ", name, " must be on ", first.device(),
                    " like the image, got ", t.device());
}

constexpr std::int64_t kNumbers = 4;  // of a tap: dy, dx, weight, joins

Taps taps_of(const char* op, at::IntArrayRef taps, std::int64_t divisor, bool bytes, bool truncates) {
  constexpr std::int64_t kFarthest = 255, kLargest = 1 << 15;
  const std::int64_t count = std::int64_t(taps.size()) / kNumbers;
  TORCH_CHECK_VALUE(count >= 1 && count <= kMostTaps, op, ": taps must be 1 to ", kMostTaps, " for an image, got ",
                    count);
  TORCH_CHECK_VALUE(divisor >= 1 && divisor < kLargest, op, ": divisors must be in 1..", kLargest - 1, ", got ",
                    divisor);
  Taps made{};
  made.count = int(count);
  const bool same = std::all_of(taps.begin(), taps.end(),
                                [&, i = 0](std::int64_t n) mutable { return i++ % kNumbers != 2 || n == taps[2]; });
  TORCH_CHECK_VALUE(same || !truncates, op, ": weights of taps must be the same where sums are truncated, got ", taps);
  made.divisor = std::int32_t(divisor);
  std::int64_t sum = 0;
  for (std::int64_t k = 0; k < count; ++k) {
    const std::int64_t *const tap = taps.data() + kNumbers * k, dy = tap[0], dx = tap[1], weight = tap[2];
    TORCH_CHECK_VALUE(std::abs(dy) <= kFarthest && std::abs(dx) <= kFarthest, op, ": taps must be at most ", kFarthest,
                      " pixels away, got ", dy, ", ", dx);
    TORCH_CHECK_VALUE(std::abs(weight) < kLargest, op, ": weights of taps must be below ", kLargest, ", got ", weight);
    made.tap[k] = {std::int16_t(dy), std::int16_t(dx), std::int16_t(weight), std::int16_t(k > 0 && tap[3] != 0)};
    made.radius_y = std::max(made.radius_y, int(std::abs(dy)));
    made.radius_x = std::max(made.radius_x, int(std::abs(dx)));
    sum += std::abs(weight);
  }
  // Sums of bytes are exact in float32 and their quotients round as the exact ones do.
  TORCH_CHECK_VALUE(!bytes || sum <= 1 << 16, op, ": weights of taps for uint8 must add up to at most ", 1 << 16,
                    ", got ", sum);
  return made;
}

// Fresh memory on the CPU costs more in page faults than in filtering.
at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::Tensor made = at::empty(sizes, options);
  if (made.is_cpu()) ask_for_huge_pages(made.mutable_data_ptr(), made.nbytes());
  return made;
}

at::Tensor filter_taps(const at::Tensor& image, FN_TAPS) {
  constexpr const char* kOp = "filter_taps";
  FilterTaps how{};
  how.dtype = image_dtype(kOp, "image", image);
  how.shape = layout_of(kOp, "image", image, channels_last);
  const bool bytes = how.dtype == Dtype::uint8;
  TORCH_CHECK_TYPE(!bytes || !transposed, kOp, ": image must be a floating type if transposed, got uint8");
  TORCH_CHECK_VALUE(border >= 0 && border <= int(Border::replicate), kOp, ": border: no such number ", border);
  TORCH_CHECK_VALUE(rounding >= 0 && rounding <= int(Rounding::truncate), kOp, ": rounding: no such number ", rounding);
  TORCH_CHECK_VALUE(!bytes || (value >= 0 && value <= 255 && value == double(int(value))), kOp,
                    ": value must be a byte like the image's, got ", value);
  const std::int64_t groups = std::int64_t(divisors.size()), B = how.shape.B;
  TORCH_CHECK_VALUE(groups == 1 || groups == B, kOp, ": divisors must be 1 or B = ", B, ", got ", groups);
  TORCH_CHECK_VALUE(std::int64_t(ptr.size()) == groups + 1 && std::is_sorted(ptr.begin(), ptr.end()) && ptr[0] == 0 &&
                        kNumbers * ptr[groups] == std::int64_t(taps.size()),
                    kOp, ": ptr must be ", groups + 1, " numbers that ascend from 0 to the number of taps, got ", ptr);
  how.border = Border(border);
  how.rounding = Rounding(rounding);
  how.value = value;
  how.transposed = transposed;
  std::vector<Taps> every;
  for (std::int64_t g = 0; g < groups; ++g)
    every.push_back(taps_of(kOp, taps.slice(kNumbers * ptr[g], kNumbers * (ptr[g + 1] - ptr[g])), divisors[g], bytes,
                            how.rounding == Rounding::truncate));
  const at::Tensor in = image.contiguous(), out = fresh(image.sizes(), image.options());
  if (out.numel() == 0) return out;
  const c10::OptionalDeviceGuard device(image.device());
  const char* const from = static_cast<const char*>(in.const_data_ptr());
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const std::int64_t step = groups == 1 ? 0 : how.shape.P * how.shape.plane() * std::int64_t(image.element_size());
  if (groups > 1) how.shape.B = 1;
  for (std::int64_t g = 0; g < groups; ++g) {
    how.image = from + g * step;
    how.out = to + g * step;
    how.taps = every[std::size_t(g)];
    kernels(image).taps(how);
  }
  return out;
}

at::Tensor pyramid_step(const at::Tensor& image, std::int64_t step, std::int64_t h, std::int64_t w) {
  constexpr const char* kOp = "pyramid_step";
  TORCH_CHECK_VALUE(step >= 0 && step < kSteps, kOp, ": step: no such number ", step);
  TORCH_CHECK_TYPE(at::isFloatingType(image.scalar_type()) && dtype_of(image.scalar_type()), kOp,
                   ": image must be float32, float64, float16 or bfloat16, got ", image.scalar_type());
  TORCH_CHECK_VALUE(image.dim() >= 2, kOp, ": image must be [..., H, W], got ", image.sizes());
  const std::int64_t in_h = image.size(-2), in_w = image.size(-1);
  const bool down = coarsens(Step(step));
  const std::array<std::int64_t, 2> fine{down ? in_h : h, down ? in_w : w}, coarse{down ? h : in_h, down ? w : in_w};
  for (int i = 0; i < 2; ++i)
    TORCH_CHECK_VALUE(coarser(fine[i]) == coarse[i], kOp, ": the coarse size must be (n + 1) / 2 of the fine size ",
                      at::IntArrayRef(fine), ", got ", at::IntArrayRef(coarse));
  auto sizes = image.sizes().vec();
  sizes[sizes.size() - 2] = h;
  sizes[sizes.size() - 1] = w;
  const at::Tensor in = full(image).contiguous(), out = fresh(sizes, in.options());
  if (out.numel() > 0) {
    const c10::OptionalDeviceGuard device(image.device());
    kernels(image).step({Step(step), in.numel() / (in_h * in_w), in_h, in_w, h, w, in.const_data_ptr(),
                         out.mutable_data_ptr(), *dtype_of(in.scalar_type())});
  }
  return out.to(image.scalar_type());
}

// The three images of a blend, dense and in a type that the kernels compute with.
struct Blend {
  at::Tensor background, foreground, mask;
  Multiband how{};

  Blend(const char* op, FN_MULTIBAND) {
    image_dtype(op, "background", background);
    how.shape = layout_of(op, "background", background, channels_last);
    const Layout& s = how.shape;
    check_like(op, "foreground", foreground, background.sizes(), background);
    check_like(op, "mask", mask, {s.B, s.H, s.W}, background);
    TORCH_CHECK_VALUE(levels >= 0 && levels <= kMostLevels, op, ": levels must be in 0..", kMostLevels, ", got ",
                      levels);
    // At a level of one pixel there is nothing left to part.
    for (Index n = std::max(s.H, s.W); n > 1 && how.levels < levels; n = coarser(n)) ++how.levels;
    this->background = full(background).contiguous();
    this->foreground = full(foreground).contiguous();
    this->mask = full(mask).contiguous();
    how.dtype = *dtype_of(this->background.scalar_type());
    how.background = this->background.const_data_ptr();
    how.foreground = this->foreground.const_data_ptr();
    how.mask = this->mask.const_data_ptr();
  }

  at::Tensor scratch(Parts parts) const {
    const auto type = how.dtype == Dtype::float64 ? at::kDouble : at::kFloat;
    return fresh({multiband_scratch(how.shape, parts, how.levels)}, background.options().dtype(type));
  }
};

at::Tensor multiband_blend(FN_MULTIBAND) {
  Blend blend("multiband_blend", background, foreground, mask, levels, channels_last);
  const at::Tensor out = fresh(background.sizes(), blend.background.options());
  if (out.numel() > 0) {
    const c10::OptionalDeviceGuard device(background.device());
    const at::Tensor scratch = blend.scratch(kForwardParts);
    blend.how.out = out.mutable_data_ptr();
    blend.how.scratch = scratch.mutable_data_ptr();
    kernels(background).multiband(blend.how);
  }
  return out.to(background.scalar_type());
}

Three multiband_blend_backward(const at::Tensor& grad, FN_MULTIBAND, std::array<bool, 3> wanted) {
  constexpr const char* kOp = "multiband_blend_backward";
  TORCH_CHECK_TYPE(at::isFloatingType(background.scalar_type()), kOp, ": background must be a floating type, got ",
                   background.scalar_type());
  Blend blend(kOp, background, foreground, mask, levels, channels_last);
  check_like(kOp, "grad", grad, background.sizes(), background);
  const at::Tensor dense = full(grad).contiguous();
  const std::array<at::Tensor, 3> like{background, foreground, mask};
  std::array<at::Tensor, 3> out;
  for (std::size_t k = 0; k < 3; ++k) out[k] = fresh(wanted[k] ? like[k].sizes() : at::IntArrayRef{0}, dense.options());
  if (grad.numel() > 0 && (wanted[0] || wanted[1] || wanted[2])) {
    const c10::OptionalDeviceGuard device(grad.device());
    const at::Tensor scratch = blend.scratch(kBackwardParts);
    blend.how.scratch = scratch.mutable_data_ptr();
    MultibandBackward how{blend.how, dense.const_data_ptr(), nullptr, nullptr, nullptr};
    if (wanted[0]) how.by_background = out[0].mutable_data_ptr();
    if (wanted[1]) how.by_foreground = out[1].mutable_data_ptr();
    if (wanted[2]) how.by_mask = out[2].mutable_data_ptr();
    kernels(grad).multiband_backward(how);
  } else {
    for (at::Tensor& t : out) t.zero_();
  }
  const auto type = background.scalar_type();
  return {out[0].to(type), out[1].to(type), out[2].to(type)};
}

// ---- autograd

// It is linear: its derivative is its transpose, and the derivative of that is itself without a border's constant.
struct FilterTapsFunction : torch::autograd::Function<FilterTapsFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& image, FN_TAPS) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["taps"] = taps.vec();
    ctx->saved_data["ptr"] = ptr.vec();
    ctx->saved_data["divisors"] = divisors.vec();
    ctx->saved_data["border"] = border;
    ctx->saved_data["transposed"] = transposed;
    ctx->saved_data["channels_last"] = channels_last;
    return call_filter_taps(image, taps, ptr, divisors, border, value, rounding, transposed, channels_last);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    auto& saved = ctx->saved_data;
    variable_list out(9);
    out[0] = call_filter_taps(grad[0], saved["taps"].toIntVector(), saved["ptr"].toIntVector(),
                              saved["divisors"].toIntVector(), saved["border"].toInt(), 0.0, int(Rounding::nearest),
                              !saved["transposed"].toBool(), saved["channels_last"].toBool());
    return out;
  }
};

at::Tensor filter_taps_autograd(const at::Tensor& image, FN_TAPS) {
  refuse_forward_mode("filter_taps", image);
  if (records(image))
    return FilterTapsFunction::apply(image, taps, ptr, divisors, border, value, rounding, transposed, channels_last);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_filter_taps(image, taps, ptr, divisors, border, value, rounding, transposed, channels_last);
}

constexpr Step transpose_of(Step step) {
  switch (step) {
    case Step::down:
      return Step::down_transposed;
    case Step::up:
      return Step::up_transposed;
    case Step::down_transposed:
      return Step::down;
    default:
      return Step::up;
  }
}

struct PyramidStepFunction : torch::autograd::Function<PyramidStepFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& image, std::int64_t step, const c10::SymInt& h,
                            const c10::SymInt& w) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["step"] = step;
    ctx->saved_data["h"] = image.sym_size(-2);
    ctx->saved_data["w"] = image.sym_size(-1);
    return call_pyramid_step(image, step, h, w);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    auto& saved = ctx->saved_data;
    const Step step = transpose_of(Step(saved["step"].toInt()));
    return {call_pyramid_step(grad[0], int(step), saved["h"].toSymInt(), saved["w"].toSymInt()), {}, {}, {}};
  }
};

at::Tensor pyramid_step_autograd(const at::Tensor& image, std::int64_t step, c10::SymInt h, c10::SymInt w) {
  refuse_forward_mode("pyramid_step", image);
  if (records(image)) return PyramidStepFunction::apply(image, step, h, w);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_pyramid_step(image, step, h, w);
}

at::Tensor stepped(const at::Tensor& image, Step step, const c10::SymInt& h, const c10::SymInt& w) {
  return call_pyramid_step(image, int(step), h, w);
}
at::Tensor stepped_down(const at::Tensor& image, Step step) {
  return stepped(image, step, (image.sym_size(-2) + 1) / 2, (image.sym_size(-1) + 1) / 2);
}
at::Tensor stepped_up(const at::Tensor& image, Step step, const at::Tensor& like) {
  return stepped(image, step, like.sym_size(-2), like.sym_size(-1));
}

// The gradients again, of ops that autograd knows: what a second derivative is taken of. filter_pyramid_cpu.cpp has the
// formulas.
std::array<at::Tensor, 3> differentiable_gradients(const at::Tensor& grad, FN_MULTIBAND) {
  const auto planar = [&](const at::Tensor& t) { return channels_last ? full(t).permute({0, 3, 1, 2}) : full(t); };
  const std::size_t last = std::size_t(levels);
  std::vector<at::Tensor> image{planar(foreground) - planar(background)}, m{full(mask).unsqueeze(1)}, r{planar(grad)};
  for (std::size_t l = 0; l < last; ++l) {
    image.push_back(stepped_down(image[l], Step::down));
    m.push_back(stepped_down(m[l], Step::down));
    r.push_back(stepped_down(r[l], Step::up_transposed));
  }
  at::Tensor by_image, by_mask;
  for (std::size_t l = last + 1; l-- > 0;) {
    const at::Tensor band = l < last ? image[l] - stepped_up(image[l + 1], Step::up, image[l]) : image[l];
    const at::Tensor of_mask = (band * r[l]).sum(1, true);
    at::Tensor of_image = m[l] * r[l];
    if (l > 0) of_image = of_image - stepped_down(m[l - 1] * r[l - 1], Step::up_transposed);
    by_image = l < last ? of_image + stepped_up(by_image, Step::down_transposed, of_image) : of_image;
    by_mask = l < last ? of_mask + stepped_up(by_mask, Step::down_transposed, of_mask) : of_mask;
  }
  const auto type = background.scalar_type();
  const at::Tensor found = channels_last ? by_image.permute({0, 2, 3, 1}) : by_image;
  return {(full(grad) - found).to(type), found.to(type), by_mask.squeeze(1).to(type)};
}

struct MultibandFunction : torch::autograd::Function<MultibandFunction> {
  static at::Tensor forward(AutogradContext* ctx, FN_MULTIBAND) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({background, foreground, mask});
    ctx->saved_data["levels"] = levels;
    ctx->saved_data["channels_last"] = channels_last;
    return call_multiband(background, foreground, mask, levels, channels_last);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const variable_list v = ctx->get_saved_variables();
    const std::int64_t levels = ctx->saved_data["levels"].toInt();
    const bool channels_last = ctx->saved_data["channels_last"].toBool();
    const std::array<bool, 3> wanted{v[0].requires_grad(), v[1].requires_grad(), v[2].requires_grad()};
    std::array<at::Tensor, 3> found;
    if (at::GradMode::is_enabled()) {
      found = differentiable_gradients(grad[0], v[0], v[1], v[2], levels, channels_last);
    } else {
      const auto [a, b, c] = call_multiband_backward(grad[0], v[0], v[1], v[2], levels, channels_last, wanted);
      found = {a, b, c};
    }
    variable_list out(5);
    for (std::size_t k = 0; k < 3; ++k)
      if (wanted[k]) out[k] = found[k];
    return out;
  }
};

at::Tensor multiband_autograd(FN_MULTIBAND) {
  refuse_forward_mode("multiband_blend", background, foreground, mask);
  if (records(background, foreground, mask))
    return MultibandFunction::apply(background, foreground, mask, levels, channels_last);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_multiband(background, foreground, mask, levels, channels_last);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnuggets, m) {
  m.def(
      "filter_taps(Tensor image, int[] taps, int[] ptr, int[] divisors, int border, float value, int rounding, "
      "bool transposed, bool channels_last) -> Tensor");
  m.def("pyramid_step(Tensor image, int step, SymInt h, SymInt w) -> Tensor");
  m.def("multiband_blend(Tensor background, Tensor foreground, Tensor mask, int levels, bool channels_last) -> Tensor");
  m.def(
      "multiband_blend_backward(Tensor grad, Tensor background, Tensor foreground, Tensor mask, int levels, "
      "bool channels_last, bool[3] wanted) -> (Tensor, Tensor, Tensor)");
}

#define FN_ON_DEVICE(KEY)                                         \
  TORCH_LIBRARY_IMPL(fastnuggets, KEY, m) {                       \
    m.impl("filter_taps", filter_taps);                           \
    m.impl("pyramid_step", pyramid_step);                         \
    m.impl("multiband_blend", multiband_blend);                   \
    m.impl("multiband_blend_backward", multiband_blend_backward); \
  }
FN_ON_DEVICE(CPU)
FN_ON_DEVICE(CUDA)
#undef FN_ON_DEVICE

// Half inputs are taken as they are and computed with in float32, so autocast has nothing to add.
TORCH_LIBRARY_IMPL(fastnuggets, Autograd, m) {
  m.impl("filter_taps", filter_taps_autograd);
  m.impl("pyramid_step", pyramid_step_autograd);
  m.impl("multiband_blend", multiband_autograd);
  m.impl("multiband_blend_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastnuggets::filter

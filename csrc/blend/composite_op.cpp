// Schemas, checks and autograd of compositing. They must agree, so they share a file.
#include "blend/composite_op.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>

#include "common/cpu.h"
#include "common/op.h"

namespace fastnuggets::composite {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

#define FN_OBJECTS                                                                                         \
  const at::Tensor &background, const at::Tensor &pixels, const at::Tensor &mask, const at::Tensor &sizes, \
      const OptionalTensor &ptr, const OptionalTensor &place, const OptionalTensor &matrix
#define FN_RULE std::int64_t mix, bool nearest, at::ArrayRef<double> taps, bool zero_edge, bool channels_last

Three call_composite(FN_OBJECTS, FN_RULE, bool labels) {
  static const auto op = typed<decltype(call_composite)>("fastnuggets::composite");
  return op.call(background, pixels, mask, sizes, ptr, place, matrix, mix, nearest, taps, zero_edge, channels_last,
                 labels);
}
Four call_composite_backward(const at::Tensor& grad, FN_OBJECTS, FN_RULE, std::array<bool, 4> wanted) {
  static const auto op = typed<decltype(call_composite_backward)>("fastnuggets::composite_backward");
  return op.call(grad, background, pixels, mask, sizes, ptr, place, matrix, mix, nearest, taps, zero_edge,
                 channels_last, wanted);
}

// ---- checks; letters and meanings are those of composite.h

Dtype dtype_of(const at::Tensor& t) {
  const auto dtype = fastnuggets::dtype_of(t.scalar_type());
  TORCH_CHECK_TYPE(dtype && *dtype != Dtype::int16,
                   "composite: background must be uint8, float32, float64, float16 or bfloat16, got ", t.scalar_type());
  return *dtype;
}

// Tensors as the kernels read them, kept alive. Their device is the current one.
class Held {
 public:
  explicit Held(const at::Tensor& first) : first_(first), device_(first.device()) {}

  const void* dense(const char* name, const at::Tensor& t, at::ScalarType type) {
    TORCH_CHECK_TYPE(t.scalar_type() == type, "composite: ", name, " must be ", type, ", got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == first_.device(), "composite: ", name, " must be on ", first_.device(),
                      " like background, got ", t.device());
    tensors_[count_] = t.contiguous();
    return tensors_[count_++].const_data_ptr();
  }
  const Index* integers(const char* name, const at::Tensor& t, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(t.sizes() == shape, "composite: ", name, " must be ", shape, ", got ", t.sizes());
    return static_cast<const Index*>(dense(name, t, at::kLong));
  }

 private:
  const at::Tensor& first_;
  c10::DeviceGuard device_;
  std::array<at::Tensor, 8> tensors_;
  std::size_t count_ = 0;
};

// What a GPU would have to be waited for is checked on the CPU alone.
void check_values(const Composite& how) {
  const Index *p = how.ptr, *s = how.sizes;
  bool ascends = p == nullptr || (p[0] == 0 && p[how.B] == how.N);
  for (Index b = 0; p != nullptr && b < how.B; ++b) ascends = ascends && p[b] <= p[b + 1];
  TORCH_CHECK_VALUE(ascends, "composite: ptr must ascend from 0 to the number of objects, ", how.N);
  for (Index n = 0; n < how.N; ++n, s += 3) {
    const bool holds = s[0] >= 0 && s[1] >= 0 && s[2] >= 0 && s[0] <= how.P && (s[2] == 0 || s[1] <= how.P / s[2]) &&
                       s[0] + s[1] * s[2] <= how.P;
    TORCH_CHECK_VALUE(holds, "composite: sizes of object ", n, " must lie within the ", how.P,
                      " pixels of mask, got first ", s[0], ", height ", s[1], ", width ", s[2]);
  }
}

// The outputs are left null.
Composite checked(Held& held, FN_OBJECTS, FN_RULE) {
  Composite how{};
  how.dtype = dtype_of(background);
  TORCH_CHECK_VALUE(background.dim() == 4 || background.dim() == 3, "composite: background must be [B, C, H, W], ",
                    "[B, H, W, C] or one image, got ", background.sizes());
  const auto shape = background.sizes().slice(std::size_t(background.dim() - 3));
  how.channels_last = channels_last;
  how.B = background.dim() == 4 ? background.size(0) : 1;
  how.C = shape[channels_last ? 2 : 0];
  how.H = shape[channels_last ? 0 : 1];
  how.W = shape[channels_last ? 1 : 2];
  how.N = sizes.dim() == 0 ? 0 : sizes.size(0);
  how.P = mask.numel();
  const auto type = background.scalar_type();
  how.background = held.dense("background", background, type);
  TORCH_CHECK_VALUE(mask.dim() == 1, "composite: mask must be [P], got ", mask.sizes());
  TORCH_CHECK_VALUE(pixels.dim() == 1 && pixels.size(0) == how.P * how.C,
                    "composite: pixels must be [P * C = ", how.P * how.C, "], got ", pixels.sizes());
  how.pixels = held.dense("pixels", pixels, type);
  how.mask = held.dense("mask", mask, type);
  how.sizes = held.integers("sizes", sizes, {how.N, 3});
  if (ptr.has_value()) how.ptr = held.integers("ptr", *ptr, {how.B + 1});
  TORCH_CHECK_VALUE(ptr.has_value() || how.B == 1 || how.B == how.N, "composite: ptr must be given for ", how.N,
                    " objects on ", how.B, " images");
  TORCH_CHECK_VALUE(place.has_value() != matrix.has_value(), "composite: either place or matrix must be given");
  if (place.has_value()) how.place = held.integers("place", *place, {how.N, 2});
  if (matrix.has_value()) {
    TORCH_CHECK_VALUE(matrix->sizes() == at::IntArrayRef({how.N, 3, 3}), "composite: matrix must be [N = ", how.N,
                      ", 3, 3], got ", matrix->sizes());
    how.matrix = static_cast<const double*>(held.dense("matrix", *matrix, at::kDouble));
  }
  TORCH_CHECK_VALUE(mix >= 0 && mix < kMixes, "composite: mix: no such number ", mix);
  how.mix = Mix(mix);
  how.sampling = place.has_value() ? Sampling::shift : nearest ? Sampling::nearest : Sampling::bilinear;
  const Index radius = std::max<Index>(Index(taps.size()) - 1, 0);
  TORCH_CHECK_VALUE(radius <= kMaxRadius, "composite: taps must be at most ", kMaxRadius + 1, ", got ", taps.size());
  TORCH_CHECK_VALUE(radius == 0 || how.mix == Mix::over, "composite: a feather needs straight colours and mix over");
  how.feather.radius = int(radius);
  how.feather.zero_edge = zero_edge;
  for (Index k = 0; k <= radius && radius > 0; ++k) how.feather.taps[k] = taps[std::size_t(k)];
  if (background.is_cpu()) check_values(how);
  return how;
}

const Kernels& kernels(const at::Tensor& t) { return kernels_on<Kernels>(t.device()); }

at::Tensor output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor out = at::empty(sizes, options, at::MemoryFormat::Contiguous);
  if (out.is_cpu()) ask_for_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}

Three composite(FN_OBJECTS, FN_RULE, bool labels) {
  Held held(background);
  Composite how =
      checked(held, background, pixels, mask, sizes, ptr, place, matrix, mix, nearest, taps, zero_edge, channels_last);
  const at::Tensor image = output(background.sizes(), background.options());
  const std::array<Index, 3> shape{how.B, how.H, how.W};
  const auto labelled = at::IntArrayRef(shape).slice(background.dim() == 4 ? 0 : 1);
  const at::Tensor ids = output(labels ? labelled : at::IntArrayRef({0}), background.options().dtype(at::kInt));
  const at::Tensor area = output(labels ? how.N : 0, background.options().dtype(at::kLong));
  how.image = image.mutable_data_ptr();
  if (labels) {
    how.ids = ids.mutable_data_ptr<std::int32_t>();
    how.area = area.mutable_data_ptr<Index>();
  }
  kernels(background).composite(how);
  return {image, ids, area};
}

Four composite_backward(const at::Tensor& grad, FN_OBJECTS, FN_RULE, std::array<bool, 4> wanted) {
  Held held(background);
  CompositeBackward how{};
  how.forward =
      checked(held, background, pixels, mask, sizes, ptr, place, matrix, mix, nearest, taps, zero_edge, channels_last);
  TORCH_CHECK_TYPE(background.is_floating_point(), "composite_backward: background must be of a floating type, got ",
                   background.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == background.sizes(), "composite_backward: grad must be ", background.sizes(),
                    " like background, got ", grad.sizes());
  TORCH_CHECK_VALUE(!wanted[3] || matrix.has_value(), "composite_backward: no matrix has a gradient");
  how.grad = held.dense("grad", grad, background.scalar_type());
  const auto out = [&](bool is_wanted, const at::Tensor& like) {
    return output(is_wanted ? like.sizes() : at::IntArrayRef({0}), like.options());
  };
  const at::Tensor by_background = out(wanted[0], background), by_pixels = out(wanted[1], pixels),
                   by_mask = out(wanted[2], mask);
  const at::Tensor by_matrix =
      output(wanted[3] ? matrix->sizes() : at::IntArrayRef({0}), background.options().dtype(at::kDouble));
  if (wanted[0]) how.background = by_background.mutable_data_ptr();
  if (wanted[1]) how.pixels = by_pixels.mutable_data_ptr();
  if (wanted[2]) how.mask = by_mask.mutable_data_ptr();
  if (wanted[3]) how.matrix = by_matrix.mutable_data_ptr<double>();
  kernels(background).composite_backward(how);
  return {by_background, by_pixels, by_mask, by_matrix};
}

// ---- autograd

bool wants_gradient(const Variable& v) { return v.defined() && v.requires_grad(); }
OptionalTensor maybe(const Variable& v) { return v.defined() ? OptionalTensor(v) : std::nullopt; }

struct CompositeFunction : torch::autograd::Function<CompositeFunction> {
  static variable_list forward(AutogradContext* ctx, FN_OBJECTS, FN_RULE, bool labels) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({background, pixels, mask, sizes, ptr.value_or(at::Tensor()), place.value_or(at::Tensor()),
                            matrix.value_or(at::Tensor())});
    ctx->saved_data["mix"] = mix;
    ctx->saved_data["nearest"] = nearest;
    ctx->saved_data["taps"] = taps;
    ctx->saved_data["zero_edge"] = zero_edge;
    ctx->saved_data["channels_last"] = channels_last;
    const auto [image, ids, area] = call_composite(background, pixels, mask, sizes, ptr, place, matrix, mix, nearest,
                                                   taps, zero_edge, channels_last, labels);
    ctx->mark_non_differentiable({ids, area});
    return {image, ids, area};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const variable_list v = ctx->get_saved_variables();
    const std::vector<double> taps = ctx->saved_data["taps"].toDoubleVector();
    constexpr std::array<std::size_t, 4> kInputs{0, 1, 2, 6};
    std::array<bool, 4> wanted;
    for (std::size_t k = 0; k < 4; ++k) wanted[k] = wants_gradient(v[kInputs[k]]);
    const auto [by_background, by_pixels, by_mask, by_matrix] = call_composite_backward(
        grad[0], v[0], v[1], v[2], v[3], maybe(v[4]), maybe(v[5]), maybe(v[6]), ctx->saved_data["mix"].toInt(),
        ctx->saved_data["nearest"].toBool(), taps, ctx->saved_data["zero_edge"].toBool(),
        ctx->saved_data["channels_last"].toBool(), wanted);
    variable_list out(13);
    const std::array<at::Tensor, 4> found{by_background, by_pixels, by_mask, by_matrix};
    for (std::size_t k = 0; k < 4; ++k)
      if (wanted[k]) out[kInputs[k]] = found[k];
    return out;
  }
};

Three composite_autograd(FN_OBJECTS, FN_RULE, bool labels) {
  refuse_forward_mode("composite", background, pixels, mask, matrix);
  if (records(background, pixels, mask, matrix)) {
    const variable_list out = CompositeFunction::apply(background, pixels, mask, sizes, ptr, place, matrix, mix,
                                                       nearest, taps, zero_edge, channels_last, labels);
    return {out[0], out[1], out[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_composite(background, pixels, mask, sizes, ptr, place, matrix, mix, nearest, taps, zero_edge,
                        channels_last, labels);
}

}  // namespace

Three composite_through_dispatcher(FN_OBJECTS, std::int64_t mix, bool nearest, const std::vector<double>& taps,
                                   bool zero_edge, bool channels_last, bool labels) {
  return call_composite(background, pixels, mask, sizes, ptr, place, matrix, mix, nearest, taps, zero_edge,
                        channels_last, labels);
}

#define FN_SCHEMA                                                                                                      \
  "Tensor background, Tensor pixels, Tensor mask, Tensor sizes, Tensor? ptr, Tensor? place, Tensor? matrix, int mix, " \
  "bool nearest, float[] taps, bool zero_edge, bool channels_last"

TORCH_LIBRARY_FRAGMENT(fastnuggets, m) {
  m.def("composite(" FN_SCHEMA ", bool labels) -> (Tensor, Tensor, Tensor)");
  m.def("composite_backward(Tensor grad, " FN_SCHEMA ", bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
}

#define FN_ON_DEVICE(KEY)                             \
  TORCH_LIBRARY_IMPL(fastnuggets, KEY, m) {           \
    m.impl("composite", composite);                   \
    m.impl("composite_backward", composite_backward); \
  }
FN_ON_DEVICE(CPU)
FN_ON_DEVICE(CUDA)
#undef FN_ON_DEVICE

// Half inputs are taken as they are and computed with in float32, so autocast has nothing to add.
TORCH_LIBRARY_IMPL(fastnuggets, Autograd, m) {
  m.impl("composite", composite_autograd);
  m.impl("composite_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastnuggets::composite

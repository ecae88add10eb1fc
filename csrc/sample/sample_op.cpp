// Schemas, checks, autograd and autocast of sampling. They must agree, so they share a file.
#include "sample/sample_op.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/where.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <cmath>

#include "common/cpu.h"
#include "common/op.h"

namespace fastnuggets::sample {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

#define FN_NOISE const at::Tensor &key, std::int64_t kind, double parameter
#define FN_NORMAL                                                                                                      \
  const at::Tensor &mean, const at::Tensor &spread, const OptionalTensor &prior_mean, const OptionalTensor &prior_std, \
      const OptionalTensor &key, std::int64_t form, std::int64_t event_dims

// ---- the registered ops, as C++ functions through the dispatcher

at::Tensor call_scaled_noise(const OptionalTensor& loc, const at::Tensor& scale, FN_NOISE) {
  static const auto op = typed<decltype(call_scaled_noise)>("fastnuggets::scaled_noise");
  return op.call(loc, scale, key, kind, parameter);
}
void call_fill_noise_(at::Tensor& out, double loc, double scale, FN_NOISE) {
  static const auto op = typed<decltype(call_fill_noise_)>("fastnuggets::fill_noise_");
  op.call(out, loc, scale, key, kind, parameter);
}
Three call_rsample_normal(FN_NORMAL, std::array<bool, 3> wanted) {
  static const auto op = typed<decltype(call_rsample_normal)>("fastnuggets::rsample_normal");
  return op.call(mean, spread, prior_mean, prior_std, key, form, event_dims, wanted);
}
Four call_normal_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_var, const OptionalTensor& grad_kl,
                          FN_NORMAL, std::array<bool, 4> wanted) {
  static const auto op = typed<decltype(call_normal_backward)>("fastnuggets::rsample_normal_backward");
  return op.call(grad_z, grad_var, grad_kl, mean, spread, prior_mean, prior_std, key, form, event_dims, wanted);
}
at::Tensor call_log_uniform(const at::Tensor& log_alpha, std::int64_t approximation, std::int64_t event_dims) {
  static const auto op = typed<decltype(call_log_uniform)>("fastnuggets::kl_log_uniform");
  return op.call(log_alpha, approximation, event_dims);
}
at::Tensor call_log_uniform_backward(const at::Tensor& grad, const at::Tensor& log_alpha, std::int64_t approximation,
                                     std::int64_t event_dims) {
  static const auto op = typed<decltype(call_log_uniform_backward)>("fastnuggets::kl_log_uniform_backward");
  return op.call(grad, log_alpha, approximation, event_dims);
}

at::Tensor call_gumbel_softmax(const at::Tensor& logits, const at::Tensor& key, double tau, bool hard) {
  static const auto op = typed<decltype(call_gumbel_softmax)>("fastnuggets::gumbel_softmax");
  return op.call(logits, key, tau, hard);
}
at::Tensor call_gumbel_softmax_backward(const at::Tensor& grad, const at::Tensor& soft, double tau) {
  static const auto op = typed<decltype(call_gumbel_softmax_backward)>("fastnuggets::gumbel_softmax_backward");
  return op.call(grad, soft, tau);
}

// ---- checks and the structs of sample.h; letters and meanings are there

const Kernels& kernels(const at::Tensor& t) { return kernels_on<Kernels>(t.device()); }

Dtype dtype_of(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()) && fastnuggets::dtype_of(t.scalar_type()), op, ": ", name,
                   " must be float32, float64, float16 or bfloat16, got ", t.scalar_type());
  return *fastnuggets::dtype_of(t.scalar_type());
}

// The type of sums over a tensor's elements.
at::ScalarType sum_type(const at::Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_like(const char* op, const char* name, const at::Tensor& t, const at::Tensor& first,
                const char* first_name) {
  TORCH_CHECK_VALUE(t.sizes() == first.sizes(), op, ": ", name, " must be ", first.sizes(), " like ", first_name,
                    ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == first.scalar_type(), op, ": ", name, " must be ", first.scalar_type(), " like ",
                   first_name, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == first.device(), op, ": ", name, " must be on ", first.device(), " like ", first_name,
                    ", got ", t.device());
}

// Tensors as the kernels read them, kept alive: dense, or one element for all. Their device is the current one.
class Held {
 public:
  explicit Held(const at::Tensor& first) : device_(first.device()) {}

  Operand operand(const at::Tensor& t) {
    bool constant = t.numel() > 0;
    for (std::int64_t i = 0; i < t.dim(); ++i) constant = constant && (t.size(i) == 1 || t.stride(i) == 0);
    tensors_[count_] = constant ? t : t.contiguous();
    return {tensors_[count_++].const_data_ptr(), constant, 0};
  }
  Operand operand(const OptionalTensor& t, double otherwise) {
    if (t.has_value() && t->defined()) return operand(*t);
    return {nullptr, true, otherwise};
  }
  const void* dense(const at::Tensor& t) {
    tensors_[count_] = t.contiguous();
    return tensors_[count_++].const_data_ptr();
  }
  const std::int64_t* key(const char* op, const at::Tensor& key, const at::Tensor& first) {
    TORCH_CHECK_TYPE(key.scalar_type() == at::kLong, op, ": key must be int64, got ", key.scalar_type());
    TORCH_CHECK_VALUE(key.dim() == 1 && key.size(0) == 2, op, ": key must be [2], got ", key.sizes());
    TORCH_CHECK_VALUE(key.device() == first.device(), op, ": key must be on ", first.device(), ", got ", key.device());
    return static_cast<const std::int64_t*>(dense(key));
  }

 private:
  c10::DeviceGuard device_;
  std::array<at::Tensor, 8> tensors_;
  std::size_t count_ = 0;
};

// An output of the sizes of `like`, dense; what is not asked for is empty.
at::Tensor output(const at::Tensor& like, bool wanted) {
  if (!wanted) return at::empty({0}, like.options());
  at::Tensor out = at::empty(like.sizes(), like.options());
  if (out.is_cpu()) ask_for_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}
void* data_of(const at::Tensor& out, bool wanted) { return wanted ? out.mutable_data_ptr() : nullptr; }

Kind kind_of(const char* op, std::int64_t kind, double parameter) {
  TORCH_CHECK_VALUE(kind >= 0 && kind < kKinds, op, ": kind: no such number ", kind);
  if (Kind(kind) == Kind::keep)
    TORCH_CHECK_VALUE(parameter >= 0 && parameter <= 1, op, ": the probability to keep must be in [0, 1], got ",
                      parameter);
  if (Kind(kind) == Kind::gain)
    TORCH_CHECK_VALUE(parameter >= 0 && std::isfinite(parameter), op, ": the deviation must not be negative, got ",
                      parameter);
  return Kind(kind);
}

Rows rows_of(const char* op, const at::Tensor& t, std::int64_t event_dims) {
  TORCH_CHECK_VALUE(event_dims >= 0 && event_dims <= t.dim(), op, ": event_dims must be in [0, ", t.dim(), "], got ",
                    event_dims);
  const auto batch = t.sizes().slice(0, std::size_t(t.dim() - event_dims)),
             event = t.sizes().slice(std::size_t(t.dim() - event_dims));
  return {c10::multiply_integers(batch), c10::multiply_integers(event)};
}
at::IntArrayRef batch_of(const at::Tensor& t, std::int64_t event_dims) {
  return t.sizes().slice(0, std::size_t(t.dim() - event_dims));
}

at::Tensor scaled_noise(const OptionalTensor& loc, const at::Tensor& scale, FN_NOISE) {
  constexpr const char* kOp = "scaled_noise";
  const Dtype dtype = dtype_of(kOp, "scale", scale);
  if (loc.has_value()) check_like(kOp, "loc", *loc, scale, "scale");
  const Kind which = kind_of(kOp, kind, parameter);
  Held held(scale);
  const std::int64_t* const words = held.key(kOp, key, scale);
  const at::Tensor out = output(scale, true);
  kernels(out).scaled_noise(
      {held.operand(loc, 0), held.operand(scale), out.mutable_data_ptr(), dtype, out.numel(), words, which, parameter});
  return out;
}

void fill_noise_(at::Tensor& out, double loc, double scale, FN_NOISE) {
  constexpr const char* kOp = "fill_noise_";
  const Dtype dtype = dtype_of(kOp, "out", out);
  const Kind which = kind_of(kOp, kind, parameter);
  Held held(out);
  const std::int64_t* const words = held.key(kOp, key, out);
  const at::Tensor dense = out.is_contiguous() ? out : at::empty(out.sizes(), out.options());
  kernels(out).scaled_noise({{nullptr, true, loc},
                             {nullptr, true, scale},
                             dense.mutable_data_ptr(),
                             dtype,
                             out.numel(),
                             words,
                             which,
                             parameter});
  if (!dense.is_same(out)) out.copy_(dense);
}

// The outputs are left null. The key is taken where a z or its gradient needs it.
Normal normal_of(const char* op, Held& held, FN_NORMAL, bool draws) {
  Normal how{};
  how.dtype = dtype_of(op, "mean", mean);
  check_like(op, "spread", spread, mean, "mean");
  if (prior_mean.has_value()) check_like(op, "prior_mean", *prior_mean, mean, "mean");
  if (prior_std.has_value()) check_like(op, "prior_std", *prior_std, mean, "mean");
  TORCH_CHECK_VALUE(form >= 0 && form < kForms, op, ": form: no such number ", form);
  TORCH_CHECK_VALUE(!draws || key.has_value(), op, ": key is missing: a sample needs it");
  how.shape = rows_of(op, mean, event_dims);
  how.form = Form(form);
  how.mean = held.operand(mean);
  how.spread = held.operand(spread);
  how.prior_mean = held.operand(prior_mean, 0);
  how.prior_std = held.operand(prior_std, 1);
  if (draws) how.key = held.key(op, *key, mean);
  return how;
}

Three rsample_normal(FN_NORMAL, std::array<bool, 3> wanted) {
  Held held(mean);
  Normal how = normal_of("rsample_normal", held, mean, spread, prior_mean, prior_std, key, form, event_dims, wanted[0]);
  const at::Tensor z = output(mean, wanted[0]), var = output(mean, wanted[1]);
  const auto sums = mean.options().dtype(sum_type(mean));
  const at::Tensor kl = wanted[2] ? at::empty(batch_of(mean, event_dims), sums) : at::empty({0}, sums);
  how.z = data_of(z, wanted[0]);
  how.var = data_of(var, wanted[1]);
  how.kl = data_of(kl, wanted[2]);
  if (wanted[0] || wanted[1] || wanted[2]) kernels(mean).normal(how);
  return {z, var, kl};
}

void check_grad_of_sums(const char* op, const at::Tensor& grad, const at::Tensor& first, std::int64_t event_dims) {
  TORCH_CHECK_VALUE(grad.sizes() == batch_of(first, event_dims), op, ": the gradient must be ",
                    batch_of(first, event_dims), ", got ", grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == sum_type(first), op, ": the gradient must be ", sum_type(first), ", got ",
                   grad.scalar_type());
}

Four rsample_normal_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_var,
                             const OptionalTensor& grad_kl, FN_NORMAL, std::array<bool, 4> wanted) {
  constexpr const char* kOp = "rsample_normal_backward";
  Held held(mean);
  NormalBackward how{};
  how.forward = normal_of(kOp, held, mean, spread, prior_mean, prior_std, key, form, event_dims, grad_z.has_value());
  if (grad_z.has_value()) check_like(kOp, "grad_z", *grad_z, mean, "mean");
  if (grad_var.has_value()) check_like(kOp, "grad_var", *grad_var, mean, "mean");
  how.grad_z = held.operand(grad_z, 0);
  how.grad_var = held.operand(grad_var, 0);
  if (grad_kl.has_value()) {
    check_grad_of_sums(kOp, *grad_kl, mean, event_dims);
    how.grad_kl = held.dense(*grad_kl);
  }
  std::array<at::Tensor, 4> out;
  for (std::size_t k = 0; k < 4; ++k) {
    out[k] = output(mean, wanted[k]);
    how.grads[k] = data_of(out[k], wanted[k]);
  }
  kernels(mean).normal_backward(how);
  return {out[0], out[1], out[2], out[3]};
}

Rows last_rows(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() > 0, op, ": ", name, " must have an axis to normalise over, got a scalar");
  return rows_of(op, t, 1);
}
void check_tau(const char* op, double tau) {
  TORCH_CHECK_VALUE(tau > 0 && std::isfinite(tau), op, ": tau must be above 0 and finite, got ", tau);
}

at::Tensor gumbel_softmax(const at::Tensor& logits, const at::Tensor& key, double tau, bool hard) {
  constexpr const char* kOp = "gumbel_softmax";
  const Dtype dtype = dtype_of(kOp, "logits", logits);
  const Rows shape = last_rows(kOp, "logits", logits);
  check_tau(kOp, tau);
  Held held(logits);
  const std::int64_t* const words = held.key(kOp, key, logits);
  const at::Tensor out = output(logits, true);
  kernels(logits).gumbel_softmax({held.operand(logits), dtype, shape, tau, words, hard, out.mutable_data_ptr()});
  return out;
}

at::Tensor gumbel_softmax_backward(const at::Tensor& grad, const at::Tensor& soft, double tau) {
  constexpr const char* kOp = "gumbel_softmax_backward";
  const Dtype dtype = dtype_of(kOp, "soft", soft);
  check_like(kOp, "grad", grad, soft, "soft");
  const Rows shape = last_rows(kOp, "soft", soft);
  check_tau(kOp, tau);
  Held held(soft);
  const at::Tensor out = output(soft, true);
  kernels(soft).gumbel_softmax_backward(
      {held.operand(grad), held.operand(soft), dtype, shape, tau, out.mutable_data_ptr()});
  return out;
}

LogUniform log_uniform_of(const char* op, Held& held, const at::Tensor& log_alpha, std::int64_t approximation,
                          std::int64_t event_dims) {
  TORCH_CHECK_VALUE(approximation >= 0 && approximation < kApproximations, op, ": approximation: no such number ",
                    approximation);
  LogUniform how{};
  how.dtype = dtype_of(op, "log_alpha", log_alpha);
  how.shape = rows_of(op, log_alpha, event_dims);
  how.approximation = Approximation(approximation);
  how.log_alpha = held.operand(log_alpha);
  return how;
}

at::Tensor kl_log_uniform(const at::Tensor& log_alpha, std::int64_t approximation, std::int64_t event_dims) {
  Held held(log_alpha);
  LogUniform how = log_uniform_of("kl_log_uniform", held, log_alpha, approximation, event_dims);
  const at::Tensor kl = at::empty(batch_of(log_alpha, event_dims), log_alpha.options().dtype(sum_type(log_alpha)));
  how.kl = kl.mutable_data_ptr();
  kernels(log_alpha).log_uniform(how);
  return kl;
}

at::Tensor kl_log_uniform_backward(const at::Tensor& grad, const at::Tensor& log_alpha, std::int64_t approximation,
                                   std::int64_t event_dims) {
  constexpr const char* kOp = "kl_log_uniform_backward";
  Held held(log_alpha);
  LogUniform how = log_uniform_of(kOp, held, log_alpha, approximation, event_dims);
  check_grad_of_sums(kOp, grad, log_alpha, event_dims);
  how.grad_kl = held.dense(grad);
  const at::Tensor out = output(log_alpha, true);
  how.grad = out.mutable_data_ptr();
  if (out.numel() > 0) kernels(log_alpha).log_uniform(how);
  return out;
}

// ---- autograd

bool wants_gradient(const Variable& v) { return v.defined() && v.requires_grad(); }
OptionalTensor maybe(const Variable& v) { return v.defined() ? OptionalTensor(v) : std::nullopt; }

// It is linear in loc and scale, so its derivative is itself, and so are all further ones.
struct ScaledNoiseFunction : torch::autograd::Function<ScaledNoiseFunction> {
  static at::Tensor forward(AutogradContext* ctx, const OptionalTensor& loc, const at::Tensor& scale, FN_NOISE) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({key});
    ctx->saved_data["kind"] = kind;
    ctx->saved_data["parameter"] = parameter;
    ctx->saved_data["moved"] = requires_grad(loc);
    ctx->saved_data["wanted"] = requires_grad(scale);
    return call_scaled_noise(loc, scale, key, kind, parameter);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    at::Tensor by_scale;
    if (ctx->saved_data["wanted"].toBool())
      by_scale = call_scaled_noise(std::nullopt, grad[0], ctx->get_saved_variables()[0],
                                   ctx->saved_data["kind"].toInt(), ctx->saved_data["parameter"].toDouble());
    return {ctx->saved_data["moved"].toBool() ? grad[0] : at::Tensor(), by_scale, {}, {}, {}};
  }
};

at::Tensor scaled_noise_autograd(const OptionalTensor& loc, const at::Tensor& scale, FN_NOISE) {
  refuse_forward_mode("scaled_noise", loc, scale);
  if (records(loc, scale)) return ScaledNoiseFunction::apply(loc, scale, key, kind, parameter);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_scaled_noise(loc, scale, key, kind, parameter);
}

void fill_noise_autograd(at::Tensor& out, double loc, double scale, FN_NOISE) {
  refuse_forward_mode("fill_noise_", out);
  TORCH_CHECK_NOT_IMPLEMENTED(!records(out), "fastnuggets::fill_noise_ has no derivative: call it under ",
                              "torch.no_grad()");
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call_fill_noise_(out, loc, scale, key, kind, parameter);
  }
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
}

at::Tensor std_of(const at::Tensor& spread, Form form) {
  switch (form) {
    case Form::logvar:
      return (spread * 0.5).exp();
    case Form::log_std:
      return spread.exp();
    case Form::var:
      return at::where(spread > 0, spread, 0).sqrt();
    case Form::rho:
      return at::softplus(spread);
    default:
      return spread;
  }
}

// d std / d spread.
at::Tensor std_slope(const at::Tensor& spread, const at::Tensor& std, Form form) {
  switch (form) {
    case Form::logvar:
      return std * 0.5;
    case Form::log_std:
      return std;
    case Form::var: {
      const at::Tensor some = spread > 0;
      return at::where(some, 0.5 * at::where(some, spread, 1).rsqrt(), 0);
    }
    case Form::rho:
      return spread.sigmoid();
    default:
      return at::ones_like(spread);
  }
}

// The gradients again, of ops that autograd knows: what a second derivative is taken of.
std::array<at::Tensor, 4> differentiable_gradients(const OptionalTensor& given_z, const OptionalTensor& given_var,
                                                   const OptionalTensor& given_kl, FN_NORMAL) {
  const auto m = full(mean), x = full(spread), std = std_of(x, Form(form));
  at::Tensor by_mean, by_std, by_prior_mean, by_prior_std;
  if (given_z.has_value()) {
    by_mean = full(*given_z);
    by_std = call_scaled_noise(std::nullopt, by_mean, *key, std::int64_t(Kind::normal), 0);
  }
  if (given_var.has_value()) {
    const at::Tensor more = 2 * full(*given_var) * std;
    by_std = by_std.defined() ? by_std + more : more;
  }
  if (given_kl.has_value()) {
    at::Tensor weight = *given_kl;
    for (std::int64_t i = 0; i < event_dims; ++i) weight = weight.unsqueeze(-1);
    const at::Tensor d = prior_mean.has_value() ? m - full(*prior_mean) : m;
    const at::Tensor prior = prior_std.has_value() ? full(*prior_std) : at::ones_like(m);
    const at::Tensor inverse = 1 / prior.square();
    by_prior_mean = -weight * d * inverse;
    by_prior_std = weight * (1 - (std.square() + d.square()) * inverse) / prior;
    const at::Tensor more = weight * (std * inverse - 1 / std);
    by_mean = by_mean.defined() ? by_mean - by_prior_mean : -by_prior_mean;
    by_std = by_std.defined() ? by_std + more : more;
  }
  const at::Tensor by_spread = by_std * std_slope(x, std, Form(form));
  std::array<at::Tensor, 4> out{by_mean, by_spread, by_prior_mean, by_prior_std};
  for (at::Tensor& t : out)
    if (t.defined()) t = t.to(mean.scalar_type());
  return out;
}

struct RsampleNormal : torch::autograd::Function<RsampleNormal> {
  static variable_list forward(AutogradContext* ctx, FN_NORMAL, std::array<bool, 3> wanted) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({mean, spread, prior_mean.value_or(at::Tensor()), prior_std.value_or(at::Tensor()),
                            key.value_or(at::Tensor())});
    ctx->saved_data["form"] = form;
    ctx->saved_data["event_dims"] = event_dims;
    ctx->saved_data["z"] = wanted[0];
    ctx->saved_data["var"] = wanted[1];
    ctx->saved_data["kl"] = wanted[2];
    ctx->set_materialize_grads(false);
    const auto [z, var, kl] = call_rsample_normal(mean, spread, prior_mean, prior_std, key, form, event_dims, wanted);
    return {z, var, kl};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    variable_list out(8);
    const OptionalTensor grad_z = ctx->saved_data["z"].toBool() ? maybe(grad[0]) : std::nullopt;
    const OptionalTensor grad_var = ctx->saved_data["var"].toBool() ? maybe(grad[1]) : std::nullopt;
    const OptionalTensor grad_kl = ctx->saved_data["kl"].toBool() ? maybe(grad[2]) : std::nullopt;
    if (!grad_z.has_value() && !grad_var.has_value() && !grad_kl.has_value()) return out;
    const variable_list v = ctx->get_saved_variables();
    const std::int64_t form = ctx->saved_data["form"].toInt(), event_dims = ctx->saved_data["event_dims"].toInt();
    const OptionalTensor prior_mean = maybe(v[2]), prior_std = maybe(v[3]), key = maybe(v[4]);
    std::array<bool, 4> wanted;
    for (std::size_t k = 0; k < 4; ++k) wanted[k] = wants_gradient(v[k]);
    // Of what the divergence alone depends on there may be nothing to work out.
    if (!grad_kl.has_value()) {
      if (wanted[0] && grad_z.has_value()) out[0] = *grad_z;
      wanted[0] = wanted[2] = wanted[3] = false;
    }
    std::array<at::Tensor, 4> found;
    if (wanted == std::array<bool, 4>{}) return out;
    if (at::GradMode::is_enabled()) {
      found =
          differentiable_gradients(grad_z, grad_var, grad_kl, v[0], v[1], prior_mean, prior_std, key, form, event_dims);
    } else {
      const auto [a, b, c, d] = call_normal_backward(grad_z, grad_var, grad_kl, v[0], v[1], prior_mean, prior_std, key,
                                                     form, event_dims, wanted);
      found = {a, b, c, d};
    }
    for (std::size_t k = 0; k < 4; ++k)
      if (wanted[k]) out[k] = found[k];
    return out;
  }
};

Three rsample_normal_autograd(FN_NORMAL, std::array<bool, 3> wanted) {
  refuse_forward_mode("rsample_normal", mean, spread, prior_mean, prior_std);
  if (records(mean, spread, prior_mean, prior_std)) {
    const variable_list out = RsampleNormal::apply(mean, spread, prior_mean, prior_std, key, form, event_dims, wanted);
    return {out[0], out[1], out[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_rsample_normal(mean, spread, prior_mean, prior_std, key, form, event_dims, wanted);
}

// The gradient is that of the soft result, which is the output or, where that is hard, is made again.
struct GumbelSoftmaxFunction : torch::autograd::Function<GumbelSoftmaxFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits, const at::Tensor& key, double tau,
                            bool hard) {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor out = call_gumbel_softmax(logits, key, tau, hard);
    ctx->save_for_backward(hard ? variable_list{logits, key} : variable_list{out});
    ctx->saved_data["tau"] = tau;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const double tau = ctx->saved_data["tau"].toDouble();
    const variable_list v = ctx->get_saved_variables();
    const at::Tensor soft = v.size() == 1 ? v[0] : call_gumbel_softmax(v[0], v[1], tau, false);
    if (!at::GradMode::is_enabled()) return {call_gumbel_softmax_backward(grad[0], soft, tau), {}, {}, {}};
    const at::Tensor s = full(soft), g = full(grad[0]);
    return {(s * (g - (g * s).sum(-1, true)) / tau).to(soft.scalar_type()), {}, {}, {}};
  }
};

at::Tensor gumbel_softmax_autograd(const at::Tensor& logits, const at::Tensor& key, double tau, bool hard) {
  refuse_forward_mode("gumbel_softmax", logits);
  if (records(logits)) return GumbelSoftmaxFunction::apply(logits, key, tau, hard);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_gumbel_softmax(logits, key, tau, hard);
}

at::Tensor differentiable_slope(const at::Tensor& log_alpha, Approximation approximation) {
  const at::Tensor x = full(log_alpha), ard = -0.5 * (-x).sigmoid();
  if (approximation == Approximation::ard) return ard;
  if (approximation == Approximation::molchanov) {
    const at::Tensor s = (kMolchanov[2] * x + kMolchanov[1]).sigmoid();
    return ard - kMolchanov[0] * kMolchanov[2] * s * (1 - s);
  }
  const at::Tensor a = x.exp();
  return -0.5 - a * (kKingma[0] + a * (2 * kKingma[1] + a * (3 * kKingma[2])));
}

struct LogUniformFunction : torch::autograd::Function<LogUniformFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& log_alpha, std::int64_t approximation,
                            std::int64_t event_dims) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({log_alpha});
    ctx->saved_data["approximation"] = approximation;
    ctx->saved_data["event_dims"] = event_dims;
    return call_log_uniform(log_alpha, approximation, event_dims);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const at::Tensor log_alpha = ctx->get_saved_variables()[0];
    const std::int64_t approximation = ctx->saved_data["approximation"].toInt(),
                       event_dims = ctx->saved_data["event_dims"].toInt();
    if (!at::GradMode::is_enabled())
      return {call_log_uniform_backward(grad[0], log_alpha, approximation, event_dims), {}, {}};
    at::Tensor weight = grad[0];
    for (std::int64_t i = 0; i < event_dims; ++i) weight = weight.unsqueeze(-1);
    const at::Tensor slope = differentiable_slope(log_alpha, Approximation(approximation));
    return {(weight * slope).to(log_alpha.scalar_type()), {}, {}};
  }
};

at::Tensor log_uniform_autograd(const at::Tensor& log_alpha, std::int64_t approximation, std::int64_t event_dims) {
  refuse_forward_mode("kl_log_uniform", log_alpha);
  if (records(log_alpha)) return LogUniformFunction::apply(log_alpha, approximation, event_dims);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_log_uniform(log_alpha, approximation, event_dims);
}

}  // namespace

#define FN_SCHEMA_NORMAL \
  "Tensor mean, Tensor spread, Tensor? prior_mean, Tensor? prior_std, Tensor? key, int form, int event_dims"

TORCH_LIBRARY_FRAGMENT(fastnuggets, m) {
  m.def("scaled_noise(Tensor? loc, Tensor scale, Tensor key, int kind, float parameter) -> Tensor");
  m.def("fill_noise_(Tensor(a!) out, float loc, float scale, Tensor key, int kind, float parameter) -> ()");
  m.def("rsample_normal(" FN_SCHEMA_NORMAL ", bool[3] wanted) -> (Tensor, Tensor, Tensor)");
  m.def("rsample_normal_backward(Tensor? grad_z, Tensor? grad_var, Tensor? grad_kl, " FN_SCHEMA_NORMAL
        ", bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gumbel_softmax(Tensor logits, Tensor key, float tau, bool hard) -> Tensor");
  m.def("gumbel_softmax_backward(Tensor grad, Tensor soft, float tau) -> Tensor");
  m.def("kl_log_uniform(Tensor log_alpha, int approximation, int event_dims) -> Tensor");
  m.def("kl_log_uniform_backward(Tensor grad, Tensor log_alpha, int approximation, int event_dims) -> Tensor");
}

#define FN_ON_DEVICE(KEY)                                       \
  TORCH_LIBRARY_IMPL(fastnuggets, KEY, m) {                     \
    m.impl("scaled_noise", scaled_noise);                       \
    m.impl("fill_noise_", fill_noise_);                         \
    m.impl("rsample_normal", rsample_normal);                   \
    m.impl("rsample_normal_backward", rsample_normal_backward); \
    m.impl("gumbel_softmax", gumbel_softmax);                   \
    m.impl("gumbel_softmax_backward", gumbel_softmax_backward); \
    m.impl("kl_log_uniform", kl_log_uniform);                   \
    m.impl("kl_log_uniform_backward", kl_log_uniform_backward); \
  }
FN_ON_DEVICE(CPU)
FN_ON_DEVICE(CUDA)
#undef FN_ON_DEVICE

// Half inputs are taken as they are and computed with in float32, so autocast has nothing to add.
TORCH_LIBRARY_IMPL(fastnuggets, Autograd, m) {
  m.impl("scaled_noise", scaled_noise_autograd);
  m.impl("fill_noise_", fill_noise_autograd);
  m.impl("rsample_normal", rsample_normal_autograd);
  m.impl("rsample_normal_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gumbel_softmax", gumbel_softmax_autograd);
  m.impl("gumbel_softmax_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("kl_log_uniform", log_uniform_autograd);
  m.impl("kl_log_uniform_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastnuggets::sample

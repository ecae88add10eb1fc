// What every family's X_op.cpp needs: typed handles, the questions autograd asks, autocast.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <optional>

namespace fastnuggets {

// A handle to a registered op; look it up once and keep it in a static.
template <class F>
auto typed(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

inline bool requires_grad(const at::Tensor& t) { return t.requires_grad(); }
inline bool requires_grad(const std::optional<at::Tensor>& t) { return t.has_value() && t->requires_grad(); }

// Whether this call must be recorded for a backward.
template <class... T>
bool records(const T&... inputs) {
  return at::GradMode::is_enabled() && (requires_grad(inputs) || ...);
}

inline bool has_tangent(const at::Tensor& t) { return t.defined() && t._fw_grad(0).defined(); }
inline bool has_tangent(const std::optional<at::Tensor>& t) { return t.has_value() && has_tangent(*t); }

template <class... T>
void refuse_forward_mode(const char* op, const T&... inputs) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(inputs) || ...), "fastnuggets::", op,
                              " has no forward-mode derivative; use reverse mode (backward)");
}

// Keeps autocast out of the ops that an autocast kernel calls.
class AutocastOff {
 public:
  explicit AutocastOff(const at::Tensor& t)
      : guard_(t.is_cuda() ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU) {}

 private:
  c10::impl::ExcludeDispatchKeyGuard guard_;
};

// Half precision in float32; anything else as it is.
inline at::Tensor full(const at::Tensor& t) {
  return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16 ? t.to(at::kFloat) : t;
}
inline std::optional<at::Tensor> full(const std::optional<at::Tensor>& t) {
  return t.has_value() && t->defined() ? std::optional<at::Tensor>(full(*t)) : t;
}

}  // namespace fastnuggets

// From tensors to the plain structs of voxelize.h. Shared by both ends.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "voxelize/voxelize.h"

// The arguments that say what stands where, in the order of the schemas.
#define FN_MOLECULES                                                                                        \
  const at::Tensor &coords, const at::Tensor &ptr, const OptionalTensor &channel, const at::Tensor &weight, \
      const OptionalTensor &size, const OptionalTensor &omega
#define FN_POSE const OptionalTensor &center, const OptionalTensor &rotation, const OptionalTensor &translation
#define FN_RULE at::ArrayRef<double> spacing, int64_t density, int64_t combine, double cutoff

namespace fastnuggets {

using OptionalTensor = std::optional<at::Tensor>;

// Checks of shapes, dtypes and devices; ValueError or TypeError that names the argument. voxelize_op.cpp has them.
void check_new_grid(FN_MOLECULES, FN_POSE, at::IntArrayRef shape, FN_RULE, at::ScalarType dtype);
void check_into(const at::Tensor& out, FN_MOLECULES, FN_POSE, FN_RULE, const OptionalTensor& filled);
void check_backward(const at::Tensor& grad, FN_MOLECULES, FN_RULE);
void check_segments(const char* name, const at::Tensor& x, const at::Tensor& ptr);
void check_expansion(const at::Tensor& y, const at::Tensor& ptr);

inline bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

template <class R>
const R* data_or_null(const OptionalTensor& t) {
  return given(t) ? t->const_data_ptr<R>() : nullptr;
}

template <class R>
PerEntry<R> per_entry(const OptionalTensor& t) {
  if (!given(t)) return {nullptr, 0, 0};
  return {t->const_data_ptr<R>(), t->stride(0), t->stride(1)};
}

// The tensors an op reads, held contiguous where a kernel wants that; they must outlive the view.
struct MoleculeTensors {
  at::Tensor coords, ptr;  // [N, 3] or, posed, [N, K, 3]; [B + 1]
  OptionalTensor channel;  // [N]
  at::Tensor weight;       // [N, C]
  OptionalTensor size, omega;
  OptionalTensor center, rotation, translation;  // [B, K, 3], [B, K, 3, 3], [B, K, 3]

  static OptionalTensor contiguous(const OptionalTensor& t) {
    return given(t) ? OptionalTensor(t->contiguous()) : std::nullopt;
  }

  MoleculeTensors(const at::Tensor& coords_, const at::Tensor& ptr_, const OptionalTensor& channel_,
                  const at::Tensor& weight_, const OptionalTensor& size_, const OptionalTensor& omega_,
                  const OptionalTensor& center_ = {}, const OptionalTensor& rotation_ = {},
                  const OptionalTensor& translation_ = {})
      : coords(coords_.contiguous()),
        ptr(ptr_.contiguous()),
        channel(contiguous(channel_)),
        weight(weight_),
        size(size_),
        omega(omega_),
        center(contiguous(center_)),
        rotation(contiguous(rotation_)),
        translation(contiguous(translation_)) {}

  bool posed() const { return coords.dim() == 3; }
  int64_t molecules() const { return ptr.size(0) - 1; }
  int64_t poses() const {
    if (posed()) return coords.size(1);
    for (const OptionalTensor* t : {&center, &rotation, &translation})
      if (given(*t)) return (*t)->size(1);
    return 1;
  }
  int64_t grids() const { return molecules() * poses(); }
  int64_t channels() const { return weight.size(1); }

  template <class R>
  Molecules<R> view() const {
    return {coords.const_data_ptr<R>(),
            ptr.const_data_ptr<int64_t>(),
            data_or_null<int64_t>(channel),
            per_entry<R>(weight),
            per_entry<R>(size),
            per_entry<R>(omega),
            data_or_null<R>(center),
            data_or_null<R>(rotation),
            data_or_null<R>(translation),
            posed(),
            molecules(),
            poses(),
            coords.size(0),
            channels()};
  }
};

// The cut-off is a promise for the grid and for its gradients. Tails of a few atoms add up, and slopes fall more slowly
// than values: each pass takes its windows so much wider.
enum class Pass { value, slope };

inline Grid make_grid(Pass pass, at::IntArrayRef shape, at::ArrayRef<double> spacing, int64_t density, int64_t combine,
                      double cutoff) {
  constexpr double kValueMargin = 2, kSlopeMargin = 16;
  return {{shape[0], shape[1], shape[2]},
          {spacing[0], spacing[1], spacing[2]},
          static_cast<Density>(density),
          static_cast<Combine>(combine),
          cutoff / (pass == Pass::value ? kValueMargin : kSlopeMargin)};
}

}  // namespace fastnuggets

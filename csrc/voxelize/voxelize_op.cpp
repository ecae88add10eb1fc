// Schemas, checks, autograd and autocast of voxelize. They must agree, so they share a file.
#include "voxelize/voxelize_op.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/op.h"
#include "voxelize/voxelize_args.h"

namespace fastnuggets {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// ---- the registered ops, as C++ functions through the dispatcher

at::Tensor call_voxelize(FN_MOLECULES, FN_POSE, at::SymIntArrayRef shape, FN_RULE, at::ScalarType dtype) {
  static const auto op = typed<decltype(call_voxelize)>("fastnuggets::voxelize");
  return op.call(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing, density,
                 combine, cutoff, dtype);
}

void call_voxelize_(at::Tensor& out, FN_MOLECULES, FN_POSE, FN_RULE, const OptionalTensor& filled) {
  static const auto op = typed<decltype(call_voxelize_)>("fastnuggets::voxelize_");
  op.call(out, coords, ptr, channel, weight, size, omega, center, rotation, translation, spacing, density, combine,
          cutoff, filled);
}

std::tuple<at::Tensor, at::Tensor> call_sparse(FN_MOLECULES, FN_POSE, at::SymIntArrayRef shape, FN_RULE,
                                               at::ScalarType dtype) {
  static const auto op = typed<decltype(call_sparse)>("fastnuggets::voxelize_sparse");
  return op.call(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing, density,
                 combine, cutoff, dtype);
}

Four call_backward(const at::Tensor& grad, FN_MOLECULES, FN_RULE, std::array<bool, 4> wanted) {
  static const auto op = typed<decltype(call_backward)>("fastnuggets::voxelize_backward");
  return op.call(grad, coords, ptr, channel, weight, size, omega, spacing, density, combine, cutoff, wanted);
}

Five call_double_backward(const OptionalTensor& position_tangent, const OptionalTensor& weight_tangent,
                          const OptionalTensor& size_tangent, const OptionalTensor& omega_tangent,
                          const at::Tensor& grad, FN_MOLECULES, FN_RULE) {
  static const auto op = typed<decltype(call_double_backward)>("fastnuggets::voxelize_double_backward");
  return op.call(position_tangent, weight_tangent, size_tangent, omega_tangent, grad, coords, ptr, channel, weight,
                 size, omega, spacing, density, combine, cutoff);
}

at::Tensor segment_sum(const at::Tensor& x, const at::Tensor& ptr) {
  static const auto op = typed<decltype(segment_sum)>("fastnuggets::segment_sum");
  return op.call(x, ptr);
}

at::Tensor segment_expand(const at::Tensor& y, const at::Tensor& ptr, c10::SymInt n) {
  static const auto op = typed<decltype(segment_expand)>("fastnuggets::segment_expand");
  return op.call(y, ptr, std::move(n));
}

// ---- autograd

// What voxelize and voxelize_ keep for their backward.
void save(AutogradContext* ctx, FN_MOLECULES, FN_POSE, FN_RULE) {
  ctx->save_for_backward({coords, ptr, channel.value_or(at::Tensor()), weight, size.value_or(at::Tensor()),
                          omega.value_or(at::Tensor()), center.value_or(at::Tensor()), rotation.value_or(at::Tensor()),
                          translation.value_or(at::Tensor())});
  ctx->saved_data["spacing"] = spacing.vec();
  ctx->saved_data["density"] = density;
  ctx->saved_data["combine"] = combine;
  ctx->saved_data["cutoff"] = cutoff;
}

// A saved input still knows whether it requires a gradient.
bool wants_gradient(const Variable& v) { return v.defined() && v.requires_grad(); }

OptionalTensor maybe(const Variable& v) { return v.defined() ? OptionalTensor(v) : std::nullopt; }

struct Saved {
  variable_list v;
  std::vector<double> spacing;
  int64_t density, combine;
  double cutoff;

  explicit Saved(AutogradContext* ctx)
      : v(ctx->get_saved_variables()),
        spacing(ctx->saved_data["spacing"].toDoubleVector()),
        density(ctx->saved_data["density"].toInt()),
        combine(ctx->saved_data["combine"].toInt()),
        cutoff(ctx->saved_data["cutoff"].toDouble()) {}
};

// [B, K, ...] of the molecules as [N, K, ...] of their atoms.
at::Tensor of_atoms(const at::Tensor& pose, const at::Tensor& ptr, const c10::SymInt& n) {
  std::vector<c10::SymInt> sizes = pose.sym_sizes().vec();
  const c10::SymInt width = c10::multiply_integers(sizes.begin() + 1, sizes.end());
  sizes[0] = n;
  return segment_expand(pose.reshape_symint({pose.sym_size(0), width}), ptr, n).view_symint(sizes);
}

at::Tensor of_molecules(const at::Tensor& x, const at::Tensor& ptr) {
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  const c10::SymInt width = c10::multiply_integers(sizes.begin() + 1, sizes.end());
  sizes[0] = ptr.sym_size(0) - 1;
  return segment_sum(x.reshape_symint({x.sym_size(0), width}), ptr).view_symint(sizes);
}

// Gradients of coords, ..., translation (nine, as saved). The kernel differentiates with respect to box positions; the
// pose is undone here with ops that autograd knows, so that it can be differentiated again.
std::array<at::Tensor, 9> gradients(const Saved& s, const at::Tensor& grad) {
  std::array<bool, 9> wanted;
  for (size_t i = 0; i < 9; ++i) wanted[i] = wants_gradient(s.v[i]);
  const at::Tensor &coords = s.v[0], &ptr = s.v[1], &center = s.v[6], &rotation = s.v[7], &translation = s.v[8];
  const c10::SymInt n = coords.sym_size(0);
  const bool posed = center.defined() || rotation.defined() || translation.defined();
  at::Tensor moved = coords.unsqueeze(1), rotations;  // [N, 1 or K, 3], [N, K, 3, 3]
  if (center.defined()) moved = moved - of_atoms(center, ptr, n);
  at::Tensor positions = moved;
  if (rotation.defined()) {
    rotations = of_atoms(rotation, ptr, n);
    positions = (rotations * moved.unsqueeze(-2)).sum(-1);
  }
  if (translation.defined()) positions = positions + of_atoms(translation, ptr, n);

  const bool place = wanted[0] || wanted[6] || wanted[7] || wanted[8];
  auto [by_position, by_weight, by_size, by_omega] =
      call_backward(grad, positions, ptr, maybe(s.v[2]), s.v[3], maybe(s.v[4]), maybe(s.v[5]), s.spacing, s.density,
                    s.combine, s.cutoff, {place, wanted[3], wanted[4], wanted[5]});
  std::array<at::Tensor, 9> out;
  if (wanted[3]) out[3] = by_weight;
  if (wanted[4]) out[4] = by_size;
  if (wanted[5]) out[5] = by_omega;
  if (!place) return out;
  if (!posed) {
    out[0] = by_position.squeeze(1);
    return out;
  }
  const at::Tensor by_moved = rotation.defined() ? (rotations * by_position.unsqueeze(-1)).sum(-2) : by_position;
  if (wanted[0]) out[0] = by_moved.sum(1);
  if (wanted[6]) out[6] = -of_molecules(by_moved, ptr);
  if (wanted[7]) out[7] = of_molecules(by_position.unsqueeze(-1) * moved.unsqueeze(-2), ptr);
  if (wanted[8]) out[8] = of_molecules(by_position, ptr);
  return out;
}

struct Voxelize : torch::autograd::Function<Voxelize> {
  static at::Tensor forward(AutogradContext* ctx, FN_MOLECULES, FN_POSE, at::SymIntArrayRef shape, FN_RULE,
                            at::ScalarType dtype) {
    at::AutoDispatchBelowADInplaceOrView below;
    save(ctx, coords, ptr, channel, weight, size, omega, center, rotation, translation, spacing, density, combine,
         cutoff);
    return call_voxelize(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing,
                         density, combine, cutoff, dtype);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto g = gradients(Saved(ctx), grad[0]);
    variable_list out(g.begin(), g.end());
    out.resize(15);
    return out;
  }
};

// Writes into `out`, whose former content gets no gradient.
struct VoxelizeInto : torch::autograd::Function<VoxelizeInto> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor out, FN_MOLECULES, FN_POSE, FN_RULE,
                            const OptionalTensor& filled) {
    at::AutoDispatchBelowADInplaceOrView below;
    save(ctx, coords, ptr, channel, weight, size, omega, center, rotation, translation, spacing, density, combine,
         cutoff);
    call_voxelize_(out, coords, ptr, channel, weight, size, omega, center, rotation, translation, spacing, density,
                   combine, cutoff, filled);
    ctx->mark_dirty({out});
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const auto g = gradients(Saved(ctx), grad[0]);
    variable_list out(1);
    out.insert(out.end(), g.begin(), g.end());
    out.resize(15);
    return out;
  }
};

struct VoxelizeBackward : torch::autograd::Function<VoxelizeBackward> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad, FN_MOLECULES, FN_RULE,
                               std::array<bool, 4> wanted) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({grad, coords, ptr, channel.value_or(at::Tensor()), weight, size.value_or(at::Tensor()),
                            omega.value_or(at::Tensor())});
    ctx->saved_data["spacing"] = spacing.vec();
    ctx->saved_data["density"] = density;
    ctx->saved_data["combine"] = combine;
    ctx->saved_data["cutoff"] = cutoff;
    ctx->set_materialize_grads(false);
    const auto [a, b, c, d] =
        call_backward(grad, coords, ptr, channel, weight, size, omega, spacing, density, combine, cutoff, wanted);
    return {a, b, c, d};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& tangent) {
    variable_list out(12);
    if (std::none_of(tangent.begin(), tangent.end(), [](const Variable& t) { return t.defined(); })) return out;
    const Saved s(ctx);
    const auto [grad, position, weight, size, omega] = call_double_backward(
        along(tangent[0]), along(tangent[1]), along(tangent[2]), along(tangent[3]), s.v[0], s.v[1], s.v[2],
        maybe(s.v[3]), s.v[4], maybe(s.v[5]), maybe(s.v[6]), s.spacing, s.density, s.combine, s.cutoff);
    const at::Tensor found[7] = {grad, position, {}, {}, weight, size, omega};
    for (size_t i = 0; i < 7; ++i)
      if (found[i].defined() && wants_gradient(s.v[i])) out[i] = found[i];
    return out;
  }
  // The output of a gradient that was not wanted is empty: nothing can come back along it.
  static OptionalTensor along(const Variable& t) {
    return t.defined() && t.dim() > 1 ? OptionalTensor(t) : std::nullopt;
  }
};

at::Tensor voxelize_autograd(FN_MOLECULES, FN_POSE, at::SymIntArrayRef shape, FN_RULE, at::ScalarType dtype) {
  refuse_forward_mode("voxelize", coords, weight, size, omega, center, rotation, translation);
  if (records(coords, weight, size, omega, center, rotation, translation))
    return Voxelize::apply(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing,
                           density, combine, cutoff, dtype);
  at::AutoDispatchBelowADInplaceOrView below;
  return call_voxelize(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing,
                       density, combine, cutoff, dtype);
}

void voxelize_into_autograd(at::Tensor& out, FN_MOLECULES, FN_POSE, FN_RULE, const OptionalTensor& filled) {
  refuse_forward_mode("voxelize_", coords, weight, size, omega, center, rotation, translation);
  if (records(out, coords, weight, size, omega, center, rotation, translation)) {
    VoxelizeInto::apply(out, coords, ptr, channel, weight, size, omega, center, rotation, translation, spacing, density,
                        combine, cutoff, filled);
    return;
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    call_voxelize_(out, coords, ptr, channel, weight, size, omega, center, rotation, translation, spacing, density,
                   combine, cutoff, filled);
  }
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
}

// A sparse grid has no gradient of its own; fastnuggets.ops.voxelize makes one from the dense backward.
std::tuple<at::Tensor, at::Tensor> voxelize_sparse_autograd(FN_MOLECULES, FN_POSE, at::SymIntArrayRef shape, FN_RULE,
                                                            at::ScalarType dtype) {
  refuse_forward_mode("voxelize_sparse", coords, weight, size, omega, center, rotation, translation);
  at::AutoDispatchBelowADInplaceOrView below;
  return call_sparse(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing, density,
                     combine, cutoff, dtype);
}

Four voxelize_backward_autograd(const at::Tensor& grad, FN_MOLECULES, FN_RULE, std::array<bool, 4> wanted) {
  refuse_forward_mode("voxelize_backward", grad, coords, weight, size, omega);
  if (records(grad, coords, weight, size, omega)) {
    const variable_list out = VoxelizeBackward::apply(grad, coords, ptr, channel, weight, size, omega, spacing, density,
                                                      combine, cutoff, wanted);
    return {out[0], out[1], out[2], out[3]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad, coords, ptr, channel, weight, size, omega, spacing, density, combine, cutoff, wanted);
}

struct SegmentSum : torch::autograd::Function<SegmentSum> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& ptr) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({ptr});
    ctx->saved_data["n"] = x.sym_size(0);
    return segment_sum(x, ptr);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    return {segment_expand(grad[0], ctx->get_saved_variables()[0], ctx->saved_data["n"].toSymInt()), {}};
  }
};

struct SegmentExpand : torch::autograd::Function<SegmentExpand> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y, const at::Tensor& ptr, const c10::SymInt& n) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({ptr});
    return segment_expand(y, ptr, n);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    return {segment_sum(grad[0], ctx->get_saved_variables()[0]), {}, {}};
  }
};

at::Tensor segment_sum_autograd(const at::Tensor& x, const at::Tensor& ptr) {
  refuse_forward_mode("segment_sum", x);
  if (records(x)) return SegmentSum::apply(x, ptr);
  at::AutoDispatchBelowADInplaceOrView below;
  return segment_sum(x, ptr);
}

at::Tensor segment_expand_autograd(const at::Tensor& y, const at::Tensor& ptr, c10::SymInt n) {
  refuse_forward_mode("segment_expand", y);
  if (records(y)) return SegmentExpand::apply(y, ptr, n);
  at::AutoDispatchBelowADInplaceOrView below;
  return segment_expand(y, ptr, n);
}

// ---- autocast: coordinates in half precision make no sense, so inputs are computed with in float32

at::Tensor voxelize_autocast(FN_MOLECULES, FN_POSE, at::SymIntArrayRef shape, FN_RULE, at::ScalarType dtype) {
  const AutocastOff off(coords);
  return call_voxelize(full(coords), ptr, channel, full(weight), full(size), full(omega), full(center), full(rotation),
                       full(translation), shape, spacing, density, combine, cutoff, dtype);
}

void voxelize_into_autocast(at::Tensor& out, FN_MOLECULES, FN_POSE, FN_RULE, const OptionalTensor& filled) {
  const AutocastOff off(coords);
  call_voxelize_(out, full(coords), ptr, channel, full(weight), full(size), full(omega), full(center), full(rotation),
                 full(translation), spacing, density, combine, cutoff, filled);
}

std::tuple<at::Tensor, at::Tensor> voxelize_sparse_autocast(FN_MOLECULES, FN_POSE, at::SymIntArrayRef shape, FN_RULE,
                                                            at::ScalarType dtype) {
  const AutocastOff off(coords);
  return call_sparse(full(coords), ptr, channel, full(weight), full(size), full(omega), full(center), full(rotation),
                     full(translation), shape, spacing, density, combine, cutoff, dtype);
}

Four voxelize_backward_autocast(const at::Tensor& grad, FN_MOLECULES, FN_RULE, std::array<bool, 4> wanted) {
  const AutocastOff off(coords);
  return call_backward(grad, full(coords), ptr, channel, full(weight), full(size), full(omega), spacing, density,
                       combine, cutoff, wanted);
}

Five voxelize_double_backward_autocast(const OptionalTensor& position_tangent, const OptionalTensor& weight_tangent,
                                       const OptionalTensor& size_tangent, const OptionalTensor& omega_tangent,
                                       const at::Tensor& grad, FN_MOLECULES, FN_RULE) {
  const AutocastOff off(coords);
  return call_double_backward(full(position_tangent), full(weight_tangent), full(size_tangent), full(omega_tangent),
                              grad, full(coords), ptr, channel, full(weight), full(size), full(omega), spacing, density,
                              combine, cutoff);
}

at::Tensor segment_sum_autocast(const at::Tensor& x, const at::Tensor& ptr) {
  const AutocastOff off(x);
  return segment_sum(full(x), ptr);
}

at::Tensor segment_expand_autocast(const at::Tensor& y, const at::Tensor& ptr, c10::SymInt n) {
  const AutocastOff off(y);
  return segment_expand(full(y), ptr, std::move(n));
}

}  // namespace

// ---- checks, called by the kernels of both ends: inference mode does not pass by autograd

namespace {

void check_per_entry(const char* name, const OptionalTensor& t, const at::Tensor& coords, const at::Tensor& weight) {
  if (!given(t)) return;
  TORCH_CHECK_VALUE(t->sizes() == weight.sizes(), name, " must be [N, C] = ", weight.sizes(), ", got ", t->sizes());
  TORCH_CHECK_TYPE(t->scalar_type() == coords.scalar_type(), name, " must have the dtype of coords ",
                   coords.scalar_type(), ", got ", t->scalar_type());
  TORCH_CHECK_VALUE(t->device() == coords.device(), name, " must be on ", coords.device(), " with coords, got ",
                    t->device());
}

void check_rule(FN_RULE) {
  TORCH_CHECK_VALUE(spacing.size() == 3, "spacing must have 3 numbers, got ", spacing.size());
  for (double h : spacing) TORCH_CHECK_VALUE(h > 0 && std::isfinite(h), "spacing must be positive, got ", h);
  TORCH_CHECK_VALUE(density >= 0 && density <= int64_t(Density::moleculekit), "density: no such number ", density);
  TORCH_CHECK_VALUE(combine >= 0 && combine <= int64_t(Combine::magnitude), "combine: no such number ", combine);
  TORCH_CHECK_VALUE(cutoff > 0 && cutoff < 1, "cutoff must be between 0 and 1, got ", cutoff);
}

void check_molecules(FN_MOLECULES, int64_t density, bool posed) {
  TORCH_CHECK_TYPE(coords.scalar_type() == at::kFloat || coords.scalar_type() == at::kDouble,
                   "coords must be float32 or float64, got ", coords.scalar_type());
  TORCH_CHECK_VALUE(coords.dim() == (posed ? 3 : 2) && coords.size(-1) == 3,
                    posed ? "positions must be [N, K, 3], got " : "coords must be [N, 3], got ", coords.sizes());
  TORCH_CHECK_TYPE(ptr.scalar_type() == at::kLong, "ptr must be int64, got ", ptr.scalar_type());
  TORCH_CHECK_VALUE(ptr.dim() == 1 && ptr.size(0) >= 1, "ptr must be [B + 1], got ", ptr.sizes());
  TORCH_CHECK_VALUE(ptr.device() == coords.device(), "ptr must be on ", coords.device(), " with coords, got ",
                    ptr.device());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == coords.size(0),
                    "weight must be [N, C] with N = ", coords.size(0), ", got ", weight.sizes());
  check_per_entry("weight", weight, coords, weight);
  check_per_entry("size", size, coords, weight);
  check_per_entry("omega", omega, coords, weight);
  const auto d = static_cast<Density>(density);
  TORCH_CHECK_VALUE(given(size) || d == Density::nearest || d == Density::trilinear,
                    "size is missing: this density needs a radius or sigma");
  TORCH_CHECK_VALUE(given(omega) || d != Density::wave, "omega is missing: the wave density needs it");
  if (!given(channel)) return;
  TORCH_CHECK_TYPE(channel->scalar_type() == at::kLong, "channels must be int64 indices, got ", channel->scalar_type());
  TORCH_CHECK_VALUE(channel->dim() == 1 && channel->size(0) == coords.size(0),
                    "channels must be [N] with N = ", coords.size(0), ", got ", channel->sizes());
  TORCH_CHECK_VALUE(channel->device() == coords.device(), "channels must be on ", coords.device(), " with coords, got ",
                    channel->device());
}

void check_pose(const char* name, const OptionalTensor& t, int64_t dims, const at::Tensor& coords,
                const at::Tensor& ptr, std::optional<int64_t>& poses) {
  if (!given(t)) return;
  TORCH_CHECK_VALUE(t->dim() == dims && t->size(0) == ptr.size(0) - 1 && t->size(-1) == 3 && t->size(2) == 3, name,
                    " must be [B, K, 3", dims == 4 ? ", 3" : "", "] with B = ", ptr.size(0) - 1, ", got ", t->sizes());
  TORCH_CHECK_VALUE(poses.value_or(t->size(1)) == t->size(1), name,
                    " must have as many poses as center and rotation: ", poses.value_or(1), ", got ", t->size(1));
  poses = t->size(1);
  TORCH_CHECK_TYPE(t->scalar_type() == coords.scalar_type(), name, " must have the dtype of coords ",
                   coords.scalar_type(), ", got ", t->scalar_type());
  TORCH_CHECK_VALUE(t->device() == coords.device(), name, " must be on ", coords.device(), " with coords, got ",
                    t->device());
}

int64_t count_poses(const at::Tensor& coords, const at::Tensor& ptr, FN_POSE) {
  std::optional<int64_t> poses;
  check_pose("center", center, 3, coords, ptr, poses);
  check_pose("rotation", rotation, 4, coords, ptr, poses);
  check_pose("translation", translation, 3, coords, ptr, poses);
  return poses.value_or(1);
}

void check_grid_dtype(const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, name,
                   " must be float32, float64, float16 or bfloat16, got ", dtype);
}

void check_old_grid(const char* name, const at::Tensor& grid, const at::Tensor& coords, const at::Tensor& ptr,
                    const at::Tensor& weight, int64_t poses) {
  const int64_t grids = (ptr.size(0) - 1) * poses;
  TORCH_CHECK_VALUE(grid.dim() == 5 && grid.size(0) == grids && grid.size(1) == weight.size(1), name,
                    " must be [B*K, C, D, H, W] with B*K = ", grids, " and C = ", weight.size(1), ", got ",
                    grid.sizes());
  for (int i = 2; i < 5; ++i)
    TORCH_CHECK_VALUE(grid.size(i) >= 1, name, " must not be empty along D, H or W, got ", grid.sizes());
  TORCH_CHECK_VALUE(grid.device() == coords.device(), name, " must be on ", coords.device(), " with coords, got ",
                    grid.device());
  check_grid_dtype(name, grid.scalar_type());
}

}  // namespace

void check_new_grid(FN_MOLECULES, FN_POSE, at::IntArrayRef shape, FN_RULE, at::ScalarType dtype) {
  check_molecules(coords, ptr, channel, weight, size, omega, density, false);
  count_poses(coords, ptr, center, rotation, translation);
  check_rule(spacing, density, combine, cutoff);
  check_grid_dtype("dtype", dtype);
  TORCH_CHECK_VALUE(shape.size() == 3, "shape must have 3 numbers, got ", shape.size());
  for (int64_t n : shape)
    TORCH_CHECK_VALUE(n >= 1 && n < (int64_t(1) << 30), "shape must be at least 1 and below 2^30, got ", n);
}

void check_into(const at::Tensor& out, FN_MOLECULES, FN_POSE, FN_RULE, const OptionalTensor& filled) {
  check_molecules(coords, ptr, channel, weight, size, omega, density, false);
  check_rule(spacing, density, combine, cutoff);
  check_old_grid("out", out, coords, ptr, weight, count_poses(coords, ptr, center, rotation, translation));
  TORCH_CHECK_VALUE(out.is_contiguous(), "out must be contiguous, got strides ", out.strides());
  if (!given(filled)) return;
  TORCH_CHECK_VALUE(filled->sizes() == at::IntArrayRef({out.size(0), out.size(1), out.size(2), 2}) &&
                        filled->scalar_type() == at::kInt && filled->is_contiguous() &&
                        filled->device() == out.device(),
                    "filled must be contiguous int32 [B*K, C, D, 2] on ", out.device(), ", got ", filled->sizes(), " ",
                    filled->scalar_type(), " on ", filled->device());
}

void check_backward(const at::Tensor& grad, FN_MOLECULES, FN_RULE) {
  check_molecules(coords, ptr, channel, weight, size, omega, density, true);
  check_rule(spacing, density, combine, cutoff);
  check_old_grid("grad", grad, coords, ptr, weight, coords.size(1));
}

void check_segments(const char* name, const at::Tensor& x, const at::Tensor& ptr) {
  TORCH_CHECK_VALUE(x.dim() == 2, name, " must have 2 dimensions, got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, name,
                   " must be float32 or float64, got ", x.scalar_type());
  TORCH_CHECK_VALUE(ptr.dim() == 1 && ptr.size(0) >= 1 && ptr.scalar_type() == at::kLong,
                    "ptr must be [segments + 1] int64, got ", ptr.sizes(), " ", ptr.scalar_type());
}

void check_expansion(const at::Tensor& y, const at::Tensor& ptr) {
  check_segments("y", y, ptr);
  TORCH_CHECK_VALUE(y.size(0) == ptr.size(0) - 1, "y must have a row for each of the ", ptr.size(0) - 1,
                    " segments of ptr, got ", y.sizes());
}

at::Tensor voxelize(FN_MOLECULES, FN_POSE, const std::vector<int64_t>& shape, const std::vector<double>& spacing,
                    int64_t density, int64_t combine, double cutoff, at::ScalarType dtype) {
  return call_voxelize(coords, ptr, channel, weight, size, omega, center, rotation, translation,
                       c10::fromIntArrayRefSlow(shape), spacing, density, combine, cutoff, dtype);
}

void voxelize_(at::Tensor out, FN_MOLECULES, FN_POSE, const std::vector<double>& spacing, int64_t density,
               int64_t combine, double cutoff, const OptionalTensor& filled) {
  call_voxelize_(out, coords, ptr, channel, weight, size, omega, center, rotation, translation, spacing, density,
                 combine, cutoff, filled);
}

}  // namespace fastnuggets

#define FN_SCHEMA_MOLECULES "Tensor ptr, Tensor? channel, Tensor weight, Tensor? size, Tensor? omega, "
#define FN_SCHEMA_POSE "Tensor? center, Tensor? rotation, Tensor? translation, "
#define FN_SCHEMA_RULE "float[3] spacing, int density, int combine, float cutoff"

TORCH_LIBRARY_FRAGMENT(fastnuggets, m) {
  m.def("voxelize(Tensor coords, " FN_SCHEMA_MOLECULES FN_SCHEMA_POSE "SymInt[3] shape, " FN_SCHEMA_RULE
        ", ScalarType dtype) -> Tensor");
  m.def("voxelize_(Tensor(a!) out, Tensor coords, " FN_SCHEMA_MOLECULES FN_SCHEMA_POSE FN_SCHEMA_RULE
        ", Tensor(b!)? filled=None) -> ()");
  m.def("voxelize_sparse(Tensor coords, " FN_SCHEMA_MOLECULES FN_SCHEMA_POSE "SymInt[3] shape, " FN_SCHEMA_RULE
        ", ScalarType dtype) -> (Tensor, Tensor)");
  m.def("voxelize_backward(Tensor grad, Tensor positions, " FN_SCHEMA_MOLECULES FN_SCHEMA_RULE
        ", bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "voxelize_double_backward(Tensor? position_tangent, Tensor? weight_tangent, Tensor? size_tangent, "
      "Tensor? omega_tangent, Tensor grad, Tensor positions, " FN_SCHEMA_MOLECULES FN_SCHEMA_RULE
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("segment_sum(Tensor x, Tensor ptr) -> Tensor");
  m.def("segment_expand(Tensor y, Tensor ptr, SymInt n) -> Tensor");
}

TORCH_LIBRARY_IMPL(fastnuggets, Autograd, m) {
  m.impl("voxelize", &fastnuggets::voxelize_autograd);
  m.impl("voxelize_", &fastnuggets::voxelize_into_autograd);
  m.impl("voxelize_sparse", &fastnuggets::voxelize_sparse_autograd);
  m.impl("voxelize_backward", &fastnuggets::voxelize_backward_autograd);
  m.impl("voxelize_double_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("segment_sum", &fastnuggets::segment_sum_autograd);
  m.impl("segment_expand", &fastnuggets::segment_expand_autograd);
}

#define FN_AUTOCAST(KEY)                                                                 \
  TORCH_LIBRARY_IMPL(fastnuggets, KEY, m) {                                              \
    m.impl("voxelize", &fastnuggets::voxelize_autocast);                                 \
    m.impl("voxelize_", &fastnuggets::voxelize_into_autocast);                           \
    m.impl("voxelize_sparse", &fastnuggets::voxelize_sparse_autocast);                   \
    m.impl("voxelize_backward", &fastnuggets::voxelize_backward_autocast);               \
    m.impl("voxelize_double_backward", &fastnuggets::voxelize_double_backward_autocast); \
    m.impl("segment_sum", &fastnuggets::segment_sum_autocast);                           \
    m.impl("segment_expand", &fastnuggets::segment_expand_autocast);                     \
  }
FN_AUTOCAST(AutocastCPU)
FN_AUTOCAST(AutocastCUDA)
#undef FN_AUTOCAST

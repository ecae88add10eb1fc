// The host's side of a call and the kernels of each device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "blend/composite.h"
#include "common/kernels.h"

namespace fastnuggets::composite {

// A device's kernels. composite_cpu.cpp fills in the CPU's.
struct Kernels {
  void (*composite)(const Composite&);
  void (*composite_backward)(const CompositeBackward&);
};

// The registered op, as bind.cpp binds it; arguments are those of its schema.
std::tuple<at::Tensor, at::Tensor, at::Tensor> composite_through_dispatcher(
    const at::Tensor& background, const at::Tensor& pixels, const at::Tensor& mask, const at::Tensor& sizes,
    const std::optional<at::Tensor>& ptr, const std::optional<at::Tensor>& place,
    const std::optional<at::Tensor>& matrix, std::int64_t mix, bool nearest, const std::vector<double>& taps,
    bool zero_edge, bool channels_last, bool labels);

}  // namespace fastnuggets::composite

// The C++ entry points of the family, as `bind.cpp` binds them; they call the registered ops through the dispatcher.
// Arguments and shapes are those of voxelize.h; `density` and `combine` are numbers of its enums.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastnuggets {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor voxelize(const at::Tensor& coords, const at::Tensor& ptr, const OptionalTensor& channel,
                    const at::Tensor& weight, const OptionalTensor& size, const OptionalTensor& omega,
                    const OptionalTensor& center, const OptionalTensor& rotation, const OptionalTensor& translation,
                    const std::vector<int64_t>& shape, const std::vector<double>& spacing, int64_t density,
                    int64_t combine, double cutoff, at::ScalarType dtype);

void voxelize_(at::Tensor out, const at::Tensor& coords, const at::Tensor& ptr, const OptionalTensor& channel,
               const at::Tensor& weight, const OptionalTensor& size, const OptionalTensor& omega,
               const OptionalTensor& center, const OptionalTensor& rotation, const OptionalTensor& translation,
               const std::vector<double>& spacing, int64_t density, int64_t combine, double cutoff,
               const OptionalTensor& filled);

}  // namespace fastnuggets

// The kernels of each device for families whose ops call them as a table of functions: a plan, or an op that has
// checked and laid out its arguments, needs no second way through the dispatcher.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <array>
#include <optional>

#include "common/storage.h"

namespace fastnuggets {

template <class Kernels>
const Kernels*& kernels_slot(c10::DeviceType device) {
  static std::array<const Kernels*, c10::COMPILE_TIME_MAX_DEVICE_TYPES> slots{};
  return slots[std::size_t(device)];
}

template <class Kernels>
const Kernels& kernels_on(c10::Device device) {
  const Kernels* found = kernels_slot<Kernels>(device.type());
  TORCH_CHECK(found != nullptr, "fastnuggets was built without kernels for ", device);
  return *found;
}

// A static one in X_cpu.cpp and, in a CUDA build, in X_cuda.cpp fills in the device's.
template <class Kernels>
struct Register {
  Register(c10::DeviceType device, const Kernels& kernels) { kernels_slot<Kernels>(device) = &kernels; }
};

inline std::optional<Dtype> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::float32;
    case at::kDouble:
      return Dtype::float64;
    case at::kHalf:
      return Dtype::float16;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kShort:
      return Dtype::int16;
    case at::kByte:
      return Dtype::uint8;
    default:
      return std::nullopt;
  }
}

}  // namespace fastnuggets

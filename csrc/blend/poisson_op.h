// The host's side of a call and the kernels of each device.
#pragma once

#include "blend/poisson.h"
#include "common/kernels.h"

namespace fastnuggets::poisson {

// A device's kernels, called with its guard set. poisson_cpu.cpp fills in the CPU's.
struct Kernels {
  void (*blend)(const Blend&);
  void (*blend_backward)(const BlendBackward&);
};

}  // namespace fastnuggets::poisson

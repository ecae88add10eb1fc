// The host's side of a call and the kernels of each device.
#pragma once

#include "blend/composite.h"
#include "common/kernels.h"

namespace fastnuggets::composite {

// A device's kernels. composite_cpu.cpp fills in the CPU's.
struct Kernels {
  void (*composite)(const Composite&);
  void (*composite_backward)(const CompositeBackward&);
};

}  // namespace fastnuggets::composite

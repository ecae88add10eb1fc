// The host's side of a call and the kernels of each device.
#pragma once

#include "blend/walker.h"
#include "common/kernels.h"

namespace fastnuggets::walker {

// A device's kernels. walker_cpu.cpp fills in the CPU's, the only ones.
struct Kernels {
  void (*walk)(const Walk&);
};

}  // namespace fastnuggets::walker

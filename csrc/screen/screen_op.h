// The host's side of a call and the kernels of each device.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/kernels.h"
#include "screen/screen.h"

namespace fastnuggets::screen {

// A device's kernels. screen_cpu.cpp fills in the CPU's and, in a CUDA build, screen_cuda.cpp the GPU's.
struct Kernels {
  void (*search)(const Search&, const at::Tensor& like);
};

}  // namespace fastnuggets::screen

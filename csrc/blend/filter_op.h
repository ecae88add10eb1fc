// The kernels of each device, and what both ends' hosts need.
#pragma once

#include "blend/filter.h"
#include "common/kernels.h"

namespace fastnuggets::filter {

// filter_cpu.cpp and filter_pyramid_cpu.cpp fill in the CPU's and, in a CUDA build, filter_cuda.cpp the GPU's.
struct Kernels {
  void (*taps)(const FilterTaps&);
  void (*step)(const PyramidStep&);
  void (*multiband)(const Multiband&);
  void (*multiband_backward)(const MultibandBackward&);
};

// Of filter_pyramid_cpu.cpp.
void pyramid_step_cpu(const PyramidStep& how);
void multiband_cpu(const Multiband& how);
void multiband_backward_cpu(const MultibandBackward& how);

}  // namespace fastnuggets::filter

// The float kernels, once for each instruction set.
#include "voxelize/voxelize_cpu_kernels.h"

namespace fastnuggets {

template <>
Kernels<float> kernels<float>(Density density) {
  return find_kernels<float>(density);
}

}  // namespace fastnuggets

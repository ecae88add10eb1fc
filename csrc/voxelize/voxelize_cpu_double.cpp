// The double kernels, and those on dual numbers that the second backward runs.
#include "voxelize/voxelize_cpu_kernels.h"

namespace fastnuggets {

template <>
Kernels<double> kernels<double>(Density density) {
  return find_kernels<double>(density);
}

template <>
Kernels<Dual<float>> kernels<Dual<float>>(Density density) {
  return find_kernels<Dual<float>>(density);
}

template <>
Kernels<Dual<double>> kernels<Dual<double>>(Density density) {
  return find_kernels<Dual<double>>(density);
}

}  // namespace fastnuggets

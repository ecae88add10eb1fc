// The host's side of a call and the kernels of each device.
#pragma once

#include "common/kernels.h"
#include "sample/sample.h"

namespace fastnuggets::sample {

// A device's kernels. sample_cpu.cpp fills in the CPU's.
struct Kernels {
  void (*scaled_noise)(const ScaledNoise&);
  void (*normal)(const Normal&);
  void (*normal_backward)(const NormalBackward&);
  void (*gumbel_softmax)(const GumbelSoftmax&);
  void (*gumbel_softmax_backward)(const GumbelSoftmaxBackward&);
  void (*log_uniform)(const LogUniform&);  // forward, or backward if `grad` is there
};

}  // namespace fastnuggets::sample

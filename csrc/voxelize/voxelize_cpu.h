// What the CPU launchers and the CPU kernels agree on.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "voxelize/voxelize_math.h"

#define FN_BODY inline __attribute__((always_inline))
#define FN_LAMBDA __attribute__((always_inline))

namespace fastnuggets {

template <class R>
struct Job {
  Molecules<R> m;
  Tangent<R> tangent;
  Grid grid;
};

// Takes the planes of one channel of one grid, in ascending order; rows outside [first, last] are zero.
template <class R>
struct Sink {
  virtual ~Sink() = default;
  virtual void rows(std::int64_t plane, int first, int last, const R* values) = 0;
};

struct Unit {
  std::int64_t g, c;
  Window planes;
};

// A row of the grid's gradient, in the type that is computed in.
template <class R>
struct GradientRows {
  const void* data;
  at::ScalarType dtype;

  template <class S>
  FN_BODY static const R* convert(const void* data, std::int64_t at, int n, R* buffer) {
    const S* row = static_cast<const S*>(data) + at;
    for (int k = 0; k < n; ++k) buffer[k] = R(row[k]);
    return buffer;
  }
  // Rows of a window lie far from one another: the processor does not foresee them.
  FN_BODY void prefetch(std::int64_t at, int n) const {
    if (dtype != c10::CppTypeToScalarType<R>::value) return;
    constexpr int kLine = 64 / int(sizeof(R));
    const R* row = static_cast<const R*>(data) + at;
    for (int k = 0; k < n; k += kLine) __builtin_prefetch(row + k);
    __builtin_prefetch(row + n - 1);
  }
  FN_BODY const R* row(std::int64_t at, int n, R* buffer) const {
    if (dtype == c10::CppTypeToScalarType<R>::value) return static_cast<const R*>(data) + at;
    switch (dtype) {
      case at::kHalf:
        return convert<at::Half>(data, at, n, buffer);
      case at::kBFloat16:
        return convert<at::BFloat16>(data, at, n, buffer);
      case at::kFloat:
        return convert<float>(data, at, n, buffer);
      default:
        return convert<double>(data, at, n, buffer);
    }
  }
};

template <class T>
using ForwardKernel = void (*)(const Job<Real<T>>&, Unit, Sink<Real<T>>&);
template <class T>
using BackwardKernel = void (*)(const Job<Real<T>>&, const GradientRows<Real<T>>&, const Gradients<Real<T>>&,
                                std::int64_t, std::int64_t);

template <class T>
struct Kernels {
  ForwardKernel<T> forward;
  BackwardKernel<T> backward;
};

// The kernels of T = float, double, Dual<float>, Dual<double> for the instruction set at hand.
template <class T>
Kernels<T> kernels(Density density);
template <>
Kernels<float> kernels<float>(Density density);
template <>
Kernels<double> kernels<double>(Density density);
template <>
Kernels<Dual<float>> kernels<Dual<float>>(Density density);
template <>
Kernels<Dual<double>> kernels<Dual<double>>(Density density);

}  // namespace fastnuggets

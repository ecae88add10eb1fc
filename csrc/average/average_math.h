// The formulas of the averages, once, for the CPU and the device.
#pragma once

#include <cstdint>

#include "average/average.h"
#include "common/storage.h"

namespace fastnuggets::average {

// Up or down with the probabilities that make the expected value x; noise is uniform in 0..65535.
FN_HD BFloat16 round_stochastic(float x, std::uint32_t noise) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  return {magnitude_bits(x) >= kInfinity ? Store<BFloat16>::of(x).bits : std::uint16_t((bits + noise) >> 16)};
}

// A float as the nearest bfloat16 (ties away from zero, or the rest would not fit) and a rest of 16 bits, which are the
// float's last.
FN_HD std::uint32_t one_nan(float x) { return magnitude_bits(x) > kInfinity ? 0x7FC00000u : bits_as<std::uint32_t>(x); }
FN_HD BFloat16 split_high(std::uint32_t bits) { return {std::uint16_t((bits + 0x8000u) >> 16)}; }
FN_HD std::int16_t split_low(std::uint32_t bits) { return std::int16_t(std::uint16_t(bits)); }
FN_HD float join(BFloat16 high, std::int16_t low) {
  return bits_as<float>((std::uint32_t(high.bits) << 16) + std::uint32_t(std::int32_t(low)));
}

FN_HD float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FN_HD double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// a + rate (w - a), from the nearer end, as torch.lerp does: rate 1 gives w.
template <class R>
struct Lerp {
  R rate;
  bool far;  // nearer to w
  FN_HD explicit Lerp(double given) : rate(given < 0.5 ? R(given) : R(given - 1)), far(!(given < 0.5)) {}
  FN_HD R operator()(R a, R w) const { return multiply_add(rate, w - a, far ? w : a); }
};

template <class R>
struct Moments {
  R mean, m2, deviation;
};
template <class R>
FN_HD Moments<R> welford(R mean, R m2, R w, R rate) {
  const R before = w - mean;
  mean = multiply_add(rate, before, mean);
  const R after = w - mean;
  return {mean, multiply_add(before, after, m2), after};
}

template <class R>
struct SgdStep {
  R weight, momentum;
};
template <class R>
FN_HD SgdStep<R> sgd(const Sgd& how, R w, R grad, R momentum) {
  R g = how.maximize ? -grad : grad;
  g = multiply_add(R(how.weight_decay), w, g);
  if (how.has_momentum) {
    momentum = how.first ? g : multiply_add(R(1 - how.dampening), g, R(how.momentum) * momentum);
    g = how.nesterov ? multiply_add(R(how.momentum), momentum, g) : momentum;
  }
  return {multiply_add(R(-how.lr), g, w), momentum};
}

template <class R>
struct AdamWStep {
  R weight, first, second;
};
template <class R>
FN_HD AdamWStep<R> adamw(const AdamW& how, R w, R grad, R first, R second) {
  const R g = how.maximize ? -grad : grad;
  first = multiply_add(R(1 - how.beta1), g - first, first);
  second = multiply_add(R(1 - how.beta2) * g, g, R(how.beta2) * second);
  using std::sqrt;  // of the type R: the C library's own is of double alone
  const R denominator = sqrt(second) / R(how.root) + R(how.eps);
  return {multiply_add(R(-how.step_size), first / denominator, w * R(how.shrink)), first, second};
}

}  // namespace fastnuggets::average

// The formulas of the averages, once, for the CPU and the device.
#pragma once

#include <cstdint>
#include <cstring>

#include "average/average.h"

namespace fastnuggets::average {

template <class To, class From>
FN_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Half types as bits: the conversions below vectorise, and are the same on the device.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// The type that is computed in.
template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

FN_HD float load(float x) { return x; }
FN_HD double load(double x) { return x; }
FN_HD float load(BFloat16 x) { return bits_as<float>(std::uint32_t(x.bits) << 16); }
FN_HD float load(Half x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  constexpr std::uint32_t kRebias = 0x38000000u;  // from an exponent about 15 to one about 127
  const std::uint32_t normal = (magnitude << 13) + kRebias + (magnitude >= 0x7C00u ? kRebias : 0u);
  const std::uint32_t subnormal = bits_as<std::uint32_t>(float(std::int32_t(magnitude)) * 0x1p-24f);
  return bits_as<float>(sign | (magnitude < 0x400u ? subnormal : normal));
}

constexpr std::uint32_t kInfinity = 0x7F800000u;
FN_HD std::uint32_t magnitude_bits(float x) { return bits_as<std::uint32_t>(x) & 0x7FFFFFFFu; }

template <class S>
struct Store;
template <>
struct Store<float> {
  FN_HD static float of(float x) { return x; }
};
template <>
struct Store<double> {
  FN_HD static double of(double x) { return x; }
};
template <>
struct Store<BFloat16> {  // to nearest, ties to even
  FN_HD static BFloat16 of(float x) {
    const std::uint32_t bits = bits_as<std::uint32_t>(x), up = bits + 0x7FFFu + ((bits >> 16) & 1u);
    return {std::uint16_t(magnitude_bits(x) > kInfinity ? 0x7FC0u : up >> 16)};
  }
};
template <>
struct Store<Half> {  // to nearest, ties to even
  FN_HD static Half of(float x) {
    const std::uint32_t sign = (bits_as<std::uint32_t>(x) >> 16) & 0x8000u, size = magnitude_bits(x);
    // Beside 0.5 a float ends where a subnormal half does, so the addition rounds there.
    const std::uint32_t subnormal = bits_as<std::uint32_t>(bits_as<float>(size) + 0.5f) - 0x3F000000u;
    const std::uint32_t normal = (size - 0x38000000u + 0xFFFu + ((size >> 13) & 1u)) >> 13;
    const std::uint32_t special = size > kInfinity ? 0x7E00u : 0x7C00u;
    const std::uint32_t finite = size < 0x38800000u ? subnormal : normal;
    return {std::uint16_t(sign | (size >= 0x47800000u ? special : finite))};
  }
};

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

// How numbers are stored: half types as bits, with conversions that vectorise and are the same on the device.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace fastnuggets {

template <class To, class From>
FN_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

enum class Dtype : std::uint8_t { float32, float64, float16, bfloat16, int16, uint8 };

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// Calls body with a number of the type, of those with a fraction.
template <class Body>
void for_floating(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float());
    case Dtype::float64:
      return body(double());
    case Dtype::float16:
      return body(Half());
    default:
      return body(BFloat16());
  }
}

// The same of those and of bytes: what images are made of.
template <class Body>
void for_pixels(Dtype dtype, Body body) {
  if (dtype == Dtype::uint8) return body(std::uint8_t());
  for_floating(dtype, body);
}

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

}  // namespace fastnuggets

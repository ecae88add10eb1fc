// Uniform and normal numbers of random words. Every step is an integer operation, a conversion of an integer, or a
// correctly rounded multiplication, addition, fused multiply-add or square root, so the bits are the same on any
// processor and GPU. No product is added to anything but by `fma`, here or by the caller: a compiler that contracts
// finds nothing to contract. What may differ is the cost: without instructions for fma each is a call of the C library.
#pragma once

#include "common/philox.h"

namespace fastnuggets {

namespace exact {

FN_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
// A product that is rounded here, whatever the caller adds to it.
FN_HD float mul(float a, float b) { return fma(a, b, 0.0f); }
FN_HD float sqrt(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}
FN_HD std::uint32_t bits(float a) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(a);
#else
  return __builtin_bit_cast(std::uint32_t, a);
#endif
}
FN_HD float value(std::uint32_t a) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(a);
#else
  return __builtin_bit_cast(float, a);
#endif
}
// Two's complement; the conversion that vector instructions have.
FN_HD float from_int(std::uint32_t a) { return float(std::int32_t(a)); }

}  // namespace exact

// ((word >> 9) + 1/2) / 2^23: strictly inside (0, 1), exact, and the complement of the word gives exactly 1 - u.
FN_HD float uniform(std::uint32_t word) { return exact::fma(exact::from_int(word >> 9), 0x1p-23f, 0x1p-24f); }

// -2 ln u of u = (word + 1/2) / 2^32, in [2^-32, 45.8]; seen over 6e8 words: right to 1.91 units of the last place.
FN_HD float minus_two_log(std::uint32_t word) {
  // Below 1/2: u = m / 2^k with m in [1/2, 1], and -ln u = k ln 2 - ln m. Above: k = 0 and 1 - u, not u, is converted.
  // Either way it is k ln 2 - ln(1 - t) with t in (0, 1/2] known to half a unit: two positive terms, so nothing
  // cancels.
  const bool above = std::int32_t(word) < 0;
  const float x = exact::from_int(above ? ~word : word) + 0.5f;  // 2^32 times the smaller of u and 1 - u
  const std::uint32_t scale = exact::bits(x);
  const float m = exact::value((scale & 0x007FFFFFu) | 0x3F800000u);  // twice the m above, as t from here on
  const float k = exact::from_int(above ? 0u : 158u - (scale >> 23));
  const float t = above ? x * 0x1p-31f : 2.0f - m;
  // (-2 ln(1 - t/2) - t) / t^2 on [0, 1]: minimax (Remez) for the relative error of the logarithm, the first
  // coefficient kept at 1/4; the others rounded to float one by one, those after it fitted again. Largest relative
  // error 4.6e-9. In pairs: one chain of eight steps would wait for itself.
  const float t2 = t * t, t4 = t2 * t2;
  const float q01 = exact::fma(0x1.554f3p-4f, t, 0.25f), q23 = exact::fma(0x1.79b688p-7f, t, 0x1.010054p-5f);
  const float q45 = exact::fma(-0x1.c47404p-8f, t, 0x1.2c833ep-7f), q67 = exact::fma(-0x1.1776e2p-7f, t, 0x1.af936p-7f);
  const float q03 = exact::fma(q23, t2, q01), q47 = exact::fma(q67, t2, q45);
  const float q = exact::fma(exact::fma(0x1.9e0362p-9f, t4, q47), t4, q03);
  return exact::fma(k, 0x1.62e43p+0f, exact::fma(t2, q, t));  // 2 ln 2 in float is right to 2.7e-9
}

struct NormalPair {
  float cosine, sine;
};

// Cosine and sine of 2 pi v with v = (word + 1/2) / 2^32; seen over 6e8 words: right to 1.34 units of the last place.
FN_HD NormalPair cosine_sine(std::uint32_t word) {
  // So many quarter turns, from the top bits, plus z eighth turns, z in [-1, 1] from the others.
  const std::uint32_t quarter = word + 0x20000000u;
  const float z = exact::from_int((word << 2) | 2u) * 0x1p-31f;
  const float z2 = z * z;
  // sin(pi/4 z) / z - C and (cos(pi/4 z) - 1) / z^2 as polynomials in z^2, found as above, C being pi/4 in float;
  // largest errors 3.4e-9 of the sine and 4.4e-10 of the cosine, relative.
  float s = -0x1.2da156p-15f;
  s = exact::fma(s, z2, 0x1.465eeap-9f);
  s = exact::fma(s, z2, -0x1.4abbbap-4f);
  s = exact::fma(s, z2, -0x1.a32b8ap-26f);
  s = exact::fma(z, 0x1.921fb6p-1f, s * z);
  float c = 0x1.d4f7eep-19f;
  c = exact::fma(c, z2, -0x1.55b2b6p-12f);
  c = exact::fma(c, z2, 0x1.03c1bp-6f);
  c = exact::fma(c, z2, -0x1.3bd3ccp-2f);
  c = exact::fma(c, z2, 1.0f);
  // Every other quarter exchanges the two; cosine is negative in the middle quarters, sine in the last two.
  const bool odd = std::int32_t(quarter << 1) < 0;
  const std::uint32_t sine_sign = quarter & 0x80000000u, cosine_sign = (quarter ^ (quarter << 1)) & 0x80000000u;
  return {exact::value(exact::bits(odd ? s : c) ^ cosine_sign), exact::value(exact::bits(odd ? c : s) ^ sine_sign)};
}

// Two independent standard normals (Box, Muller, 1958) of two words, r cos and r sin: |normal| < 6.77, never 0;
// right to 3.1 units of the last place (tests/test_philox.py).
FN_HD NormalPair normal_pair(std::uint32_t radius, std::uint32_t angle) {
  const float r = exact::sqrt(minus_two_log(radius));
  const NormalPair point = cosine_sine(angle);
  return {exact::mul(r, point.cosine), exact::mul(r, point.sine)};
}

// The normals of a block from its words, both in the order of its elements. Plain loops without branches: in a function
// with a vector target they become vector code.
FN_HD void normal_block(const std::uint32_t* words /* [64] */, float* normals /* [64] */) {
  for (int j = 0; j < kPhiloxWords; j += 2) {
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      const int i = j * kPhiloxLanes + lane;
      const NormalPair pair = normal_pair(words[i], words[i + kPhiloxLanes]);
      normals[i] = pair.cosine;
      normals[i + kPhiloxLanes] = pair.sine;
    }
  }
}

}  // namespace fastnuggets

// Forward-mode dual numbers, and the few functions the densities are made of, for real numbers and duals alike.
//
// A kernel written once for a scalar type T computes values for T = float or double, and for T = Dual<...> also the
// derivative along one direction. The second backward is the first backward run on duals: no second derivative is
// written by hand.
#pragma once

#include <cstring>

#include "common/host_device.h"

namespace fastnuggets {

template <class R>
struct Dual {
  R v;  // value
  R d;  // derivative along the direction

  Dual() = default;
  FN_HD constexpr Dual(R value) : v(value), d(0) {}
  FN_HD constexpr Dual(R value, R tangent) : v(value), d(tangent) {}

  friend FN_HD Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
  friend FN_HD Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
  friend FN_HD Dual operator-(Dual a) { return {-a.v, -a.d}; }
  friend FN_HD Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.d * b.v + a.v * b.d}; }
  friend FN_HD Dual operator/(Dual a, Dual b) {
    const R quotient = a.v / b.v;
    return {quotient, (a.d - quotient * b.d) / b.v};
  }
  FN_HD Dual& operator+=(Dual b) { return *this = *this + b; }
  FN_HD Dual& operator*=(Dual b) { return *this = *this * b; }
};

template <class T>
struct RealOf {
  using type = T;
};
template <class R>
struct RealOf<Dual<R>> {
  using type = R;
};
template <class T>
using Real = typename RealOf<T>::type;

FN_HD float value_of(float x) { return x; }
FN_HD double value_of(double x) { return x; }
template <class R>
FN_HD R value_of(Dual<R> x) {
  return x.v;
}

// A comparison looks at the value alone, and a choice is a blend: loops over these vectorise.
template <class T>
FN_HD T choose(bool first, T a, T b) {
  return first ? a : b;
}
template <class R>
FN_HD Dual<R> choose(bool first, Dual<R> a, Dual<R> b) {
  return {first ? a.v : b.v, first ? a.d : b.d};
}

FN_HD double exp_(double x) { return std::exp(x); }

#if defined(__CUDA_ARCH__)
FN_HD float exp_(float x) { return expf(x); }
#else
// exp for x <= 0 within 1 ulp, in plain arithmetic that the compiler can vectorise (std::exp it cannot).
FN_HD float exp_(float x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896f + kToInteger;
  const float n = shifted - kToInteger;
  const float r = (x - n * 0.693359375f) + n * 2.121944417e-04f;  // ln 2 in two parts, the first with few bits
  float p = 0.000198992871f;
  p = p * r + 0.00139336521f;
  p = p * r + 0.00833329838f;
  p = p * r + 0.0416664667f;
  p = p * r + 0.166666672f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // the low bits of `shifted` hold n; the rest is shifted out
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}
#endif
template <class R>
FN_HD Dual<R> exp_(Dual<R> x) {
  const R e = exp_(x.v);
  return {e, e * x.d};
}

FN_HD float sqrt_(float x) { return std::sqrt(x); }
FN_HD double sqrt_(double x) { return std::sqrt(x); }
// For arguments that are bounded away from zero.
template <class R>
FN_HD Dual<R> sqrt_(Dual<R> x) {
  const R root = sqrt_(x.v);
  return {root, x.d / (2 * root)};
}

// cos(z) and sin(z)/z as functions of y = z^2, where both are smooth, so that nothing is singular at an atom's centre.
template <class T>
struct CosSinc {
  T cosine;
  T sinc;
};

FN_HD CosSinc<double> cos_sinc(double y) {
  const double z = std::sqrt(y < 1e-60 ? 1e-60 : y);
  return {std::cos(z), std::sin(z) / z};
}

// sin(2 pi t) for |t| <= 1/4; the odd polynomial is fitted at Chebyshev nodes, its relative error is below 3e-11.
FN_HD float sin_quarter_turn(float t) {
  const float s = t * t;
  float p = -14.3941355f;
  p = p * s + 42.0098076f;
  p = p * s - 76.7042847f;
  p = p * s + 81.6052246f;
  p = p * s - 41.3417015f;
  p = p * s + 6.28318548f;
  return p * t;
}

FN_HD CosSinc<float> cos_sinc(float y) {
  constexpr float kToInteger = 12582912.0f;
  constexpr float kInverseTwoPi = 0.159154943f;
  const float z = sqrt_(y < 1e-30f ? 1e-30f : y);
  const float turns = z * kInverseTwoPi;
  const float t = turns - ((turns + kToInteger) - kToInteger);  // in [-1/2, 1/2], exact
  const float a = t < 0 ? -t : t;
  const float folded = a > 0.25f ? 0.5f - a : a;
  const float sine = sin_quarter_turn(folded);
  return {sin_quarter_turn(0.25f - a), (t < 0 ? -sine : sine) / z};
}

template <class R>
FN_HD CosSinc<Dual<R>> cos_sinc(Dual<R> y) {
  const CosSinc<R> at = cos_sinc(y.v);
  // d sinc / dy = (cos - sinc) / 2y cancels for small y; there its series: sum over n of (-1)^n n y^(n-1) / (2n+1)!
  R series = R(8.0 / 355687428096000.0);
  series = series * y.v - R(7.0 / 1307674368000.0);
  series = series * y.v + R(6.0 / 6227020800.0);
  series = series * y.v - R(5.0 / 39916800.0);
  series = series * y.v + R(4.0 / 362880.0);
  series = series * y.v - R(3.0 / 5040.0);
  series = series * y.v + R(2.0 / 120.0);
  series = series * y.v - R(1.0 / 6.0);
  const R slope = y.v < R(1) ? series : (at.cosine - at.sinc) / (2 * (y.v < R(1) ? R(1) : y.v));
  return {{at.cosine, -at.sinc / 2 * y.d}, {at.sinc, slope * y.d}};
}

}  // namespace fastnuggets

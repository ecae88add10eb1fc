// The densities, once, for the host and the device, for real numbers and duals.
//
// An atom at p adds w * f to voxel v. `delta` is p - v on one axis, q = |p - v|^2. A density is one of two kinds:
// - a product of three functions of one axis (nearest, trilinear, gaussian, pyuul): axis_value, axis_slope;
// - radial (sphere, wave, molgrid, molvoxel, moleculekit): radial_value and radial_slope, given q and, because a
//   gaussian factor is cheapest as a product over axes, `gauss` = exp(-decay * q).
// Support: voxels for which `window` holds on all three axes and, for radial densities, q <= reach_squared.
#pragma once

#include "voxelize/dual.h"
#include "voxelize/voxelize.h"

namespace fastnuggets {

constexpr bool is_product(Density d) {
  return d == Density::nearest || d == Density::trilinear || d == Density::gaussian || d == Density::pyuul;
}

// One entry's constants.
template <class T>
struct Shape {
  T size;
  T omega;
  T inverse;              // 1 / size
  T decay;                // a of the gaussian factor exp(-a q); 0: there is none
  T wave_square;          // (2 pi omega)^2
  Real<T> reach;          // half the edge of the window, angstrom
  Real<T> reach_squared;  // radial support
};

template <Density D, class T>
FN_HD Shape<T> make_shape(T size, T omega, double cutoff) {
  using R = Real<T>;
  constexpr double kTwoPi = 6.283185307179586;
  constexpr double kMoleculekitReach = 5.0;
  constexpr double kPyuulFactor = 0.93;
  Shape<T> s{size, omega, T(R(1)) / size, T(0), T(0), R(0), R(0)};
  const R r = value_of(size);
  if constexpr (D == Density::gaussian || D == Density::wave) {
    s.decay = T(R(0.5)) / (size * size);
    s.reach = r * R(std::sqrt(-2.0 * std::log(cutoff)));
  } else if constexpr (D == Density::molgrid) {
    s.decay = T(R(2)) / (size * size);
    s.reach = r * R(1.5);
  } else if constexpr (D == Density::molvoxel) {
    s.decay = T(R(2)) / (size * size);
    s.reach = r;
  } else if constexpr (D == Density::pyuul) {
    s.decay = T(R(1 / (kPyuulFactor * kPyuulFactor))) / (size * size);
  } else if constexpr (D == Density::moleculekit) {
    s.reach = R(kMoleculekitReach);
  } else if constexpr (D == Density::sphere) {
    s.reach = r;
  }
  s.reach_squared = s.reach * s.reach;
  // The published moleculekit support is open: the largest number below 25 closes it.
  if constexpr (D == Density::moleculekit) s.reach_squared -= s.reach_squared * R(sizeof(R) == 4 ? 6e-8 : 1.2e-16);
  if constexpr (D == Density::wave) s.wave_square = (T(R(kTwoPi)) * omega) * (T(R(kTwoPi)) * omega);
  return s;
}

// First and last voxel of an axis that an atom at p may reach, clamped to the axis; first > last: none.
struct Window {
  int first;
  int last;
};

template <Density D, class R>
FN_HD Window window(double p, int n, double h, R reach) {
  constexpr int kPyuulNeighbours = 5;
  double low, high;
  const double at = p / h + 0.5 * (n - 1);  // in voxels
  if constexpr (D == Density::nearest || D == Density::pyuul) {
    const int k = D == Density::pyuul ? kPyuulNeighbours : 0;
    const double cell = std::floor(at + 0.5);
    low = cell - k;
    high = cell + k;
  } else {
    const double voxels = D == Density::trilinear ? 1.0 : double(reach) / h;
    low = std::ceil(at - voxels);
    high = std::floor(at + voxels);
  }
  // Written so that a NaN gives an empty window and no huge number is converted to int.
  if (!(low <= n - 1 && high >= 0)) return {0, -1};
  return {low < 0 ? 0 : int(low), high > n - 1 ? n - 1 : int(high)};
}

// ---- products of three axes

template <Density D, class T>
FN_HD T axis_value(T delta, const Shape<T>& s, Real<T> h) {
  using R = Real<T>;
  if constexpr (D == Density::trilinear) {
    const T hat = T(R(1)) - choose(value_of(delta) < 0, -delta, delta) * T(R(1) / h);
    return choose(value_of(hat) > 0, hat, T(R(0)));
  } else if constexpr (D == Density::nearest) {
    return T(R(1));
  } else {
    return exp_(-(s.decay * delta * delta));
  }
}

template <class T>
struct AxisSlope {
  T value;
  T position;  // derivative with respect to p
  T size;      // derivative with respect to size
};

template <Density D, class T>
FN_HD AxisSlope<T> axis_slope(T delta, const Shape<T>& s, Real<T> h) {
  using R = Real<T>;
  const T value = axis_value<D>(delta, s, h);
  if constexpr (D == Density::trilinear) {
    const R sign = value_of(delta) > 0 ? R(-1) : value_of(delta) < 0 ? R(1) : R(0);
    return {value, T(value_of(value) > 0 ? sign / h : R(0)), T(R(0))};
  } else if constexpr (D == Density::nearest) {
    return {value, T(R(0)), T(R(0))};
  } else {
    const T slope = T(R(-2)) * s.decay * delta * value;
    return {value, slope, -(slope * delta * s.inverse)};
  }
}

// ---- radial

// The repulsive density 1 - exp(-z), z = (r/d)^12. Beyond z = 80 nothing is left of exp(-z).
template <class T>
struct Repulsion {
  T z;
  T exp_minus_z;
  T value;
};
template <class T>
FN_HD Repulsion<T> repulsion(T q, const Shape<T>& s) {
  using R = Real<T>;
  constexpr R kLargest = R(80);
  const T ratio = s.size * s.size / choose(value_of(q) > R(1e-6), q, T(R(1e-6)));
  const T capped = choose(value_of(ratio) < R(2.1), ratio, T(R(2.1)));  // 2.1^6 > 80, and no overflow
  const T cube = capped * capped * capped;
  const T z = cube * cube;
  const T bounded = choose(value_of(z) < kLargest, z, T(kLargest));
  const T e = exp_(-bounded);
  // The difference loses what is small beside 1: there, the series.
  const T series = z * (T(R(1)) - z * (T(R(0.5)) - z * (T(R(1.0 / 6)) - z * (T(R(1.0 / 24)) - z * T(R(1.0 / 120))))));
  return {bounded, e, choose(value_of(z) < R(sizeof(R) == 4 ? 0.02 : 1e-3), series, T(R(1)) - e)};
}

template <Density D, class T>
FN_HD T radial_value(T q, T gauss, const Shape<T>& s) {
  using R = Real<T>;
  if constexpr (D == Density::wave) {
    return gauss * cos_sinc(s.wave_square * q).cosine;
  } else if constexpr (D == Density::molgrid) {
    constexpr R kTail = R(0.5413411329464508);  // 4 exp(-2)
    const bool inside = value_of(q) <= value_of(s.size) * value_of(s.size);
    const T u = sqrt_(q) * s.inverse;
    const T left = choose(value_of(u) < R(1.5), u - T(R(1.5)), T(R(0)));
    return choose(inside, gauss, T(kTail) * left * left);
  } else if constexpr (D == Density::moleculekit) {
    return choose(value_of(q) <= s.reach_squared, repulsion(q, s).value, T(R(0)));
  } else {
    return choose(value_of(q) <= s.reach_squared, gauss, T(R(0)));
  }
}

template <class T>
struct RadialSlope {
  T value;
  T q;  // derivative with respect to q; that with respect to p is 2 * q * delta
  T size;
  T omega;
};

template <Density D, class T>
FN_HD RadialSlope<T> radial_slope(T q, T gauss, const Shape<T>& s) {
  using R = Real<T>;
  const T zero(R(0));
  if constexpr (D == Density::wave) {
    const CosSinc<T> c = cos_sinc(s.wave_square * q);
    const T value = gauss * c.cosine;
    constexpr R kFourPiSquare = R(39.47841760435743);
    return {value, -(s.decay * value) - T(R(0.5)) * s.wave_square * gauss * c.sinc,
            T(R(2)) * s.decay * q * value * s.inverse, -(T(kFourPiSquare) * s.omega * q * gauss * c.sinc)};
  } else if constexpr (D == Density::molgrid) {
    constexpr R kTail = R(0.5413411329464508);
    const bool inside = value_of(q) <= value_of(s.size) * value_of(s.size);
    // Not a number at q = 0, where it is not chosen.
    const T u = sqrt_(q) * s.inverse;
    const T left = choose(value_of(u) < R(1.5), u - T(R(1.5)), zero);
    const T tail_q = T(kTail) * s.inverse * s.inverse * left / u;
    const T slope_q = choose(inside, -(s.decay * gauss), tail_q);
    const T value = choose(inside, gauss, T(kTail) * left * left);
    // f depends on q / size^2 alone.
    return {value, slope_q, T(R(-2)) * slope_q * q * s.inverse, zero};
  } else if constexpr (D == Density::moleculekit) {
    const Repulsion<T> r = repulsion(q, s);
    const bool inside = value_of(q) <= s.reach_squared && value_of(r.z) < R(80);
    const T slope_log = choose(inside, T(R(6)) * r.z * r.exp_minus_z, zero);
    const T safe_q = choose(value_of(q) > R(1e-6), q, T(R(1e-6)));
    return {choose(value_of(q) <= s.reach_squared, r.value, zero), -(slope_log / safe_q),
            T(R(2)) * slope_log * s.inverse, zero};
  } else {
    const T value = choose(value_of(q) <= s.reach_squared, gauss, zero);
    const T slope_q = -(s.decay * value);
    return {value, slope_q, T(R(-2)) * slope_q * q * s.inverse, zero};
  }
}

// ---- combining the atoms of a channel; a grid starts at 0

template <class T>
FN_HD T combined(Combine rule, T grid, T atom) {
  if (rule == Combine::sum) return grid + atom;
  if (rule == Combine::max) return choose(value_of(atom) > value_of(grid), atom, grid);
  if (rule == Combine::magnitude) return grid + choose(value_of(atom) < 0, -atom, atom);
  return grid + atom - grid * atom;
}

// What d(combined)/d(own) is multiplied with for each other atom of the channel. At a tie of max the first atom counts.
template <class T>
FN_HD T factor_of_other(Combine rule, T factor, T own, T other, bool other_is_first) {
  using R = Real<T>;
  if (rule == Combine::set_union) return factor * (T(R(1)) - other);
  if (rule != Combine::max) return factor;
  const bool hidden = value_of(other) > value_of(own) || (other_is_first && value_of(other) == value_of(own));
  return choose(hidden, T(R(0)), factor);
}

// A maximum starts from the empty grid's 0: an atom below that has no part in it.
template <class T>
FN_HD T factor_of_own(Combine rule, T own) {
  using R = Real<T>;
  if (rule == Combine::magnitude) return T(value_of(own) < 0 ? R(-1) : R(1));
  return T(rule == Combine::max && !(value_of(own) > 0) ? R(0) : R(1));
}

// ---- pose

// Box position of an atom. Computed in double: a float's rounding of a rotated 10 angstrom is seen in the last digit.
template <class R>
FN_HD void box_position(const Molecules<R>& m, std::int64_t n, std::int64_t g, double* p) {
  const R* x = m.posed ? m.coords + (n * m.K + g % m.K) * 3 : m.coords + n * 3;
  double y[3];
  for (int i = 0; i < 3; ++i) p[i] = double(x[i]);
  if (m.posed) return;
  if (m.center != nullptr)
    for (int i = 0; i < 3; ++i) p[i] -= double(m.center[g * 3 + i]);
  if (m.rotation != nullptr) {
    const R* r = m.rotation + g * 9;
    for (int i = 0; i < 3; ++i) y[i] = r[3 * i] * p[0] + r[3 * i + 1] * p[1] + r[3 * i + 2] * p[2];
    for (int i = 0; i < 3; ++i) p[i] = y[i];
  }
  if (m.translation != nullptr)
    for (int i = 0; i < 3; ++i) p[i] += double(m.translation[g * 3 + i]);
}

template <class R>
FN_HD R entry(const PerEntry<R>& of, std::int64_t n, std::int64_t c) {
  return of.data == nullptr ? R(0) : of.data[n * of.atom_stride + c * of.channel_stride];
}

}  // namespace fastnuggets

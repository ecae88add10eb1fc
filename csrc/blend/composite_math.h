// The formulas of compositing, for both ends: how colours mix, where an object lies, what is read of it there.
#pragma once

#include "blend/composite.h"
#include "common/host_device.h"

namespace fastnuggets::composite {

template <class T>
FN_HD T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FN_HD T larger(T a, T b) {
  return a < b ? b : a;
}

// ---- colours

// Where a is 0 or 1 straight colours are not computed with: a pixel is the one or the other, bit for bit.
template <Mix mix, class R>
FN_HD R mixed(R f, R a, R u) {
  if constexpr (mix == Mix::over_premultiplied) return f + (1 - a) * u;
  if constexpr (mix == Mix::difference_premultiplied) return std::abs(f - a * u) + (1 - a) * u;
  const R top = mix == Mix::over ? f : std::abs(f - u);
  const R between = a * top + (1 - a) * u;
  return a == 0 ? u : a == 1 ? top : between;
}

template <class R>
struct Slopes {
  R f, a, u;
};

template <class R>
FN_HD R sign(R x) {
  return x > 0 ? R(1) : x < 0 ? R(-1) : R(0);
}

template <Mix mix, class R>
FN_HD Slopes<R> slopes(R f, R a, R u) {
  if constexpr (mix == Mix::over) return {a, f - u, 1 - a};
  if constexpr (mix == Mix::over_premultiplied) return {1, -u, 1 - a};
  if constexpr (mix == Mix::difference) {
    const R s = sign(f - u);
    return {a * s, std::abs(f - u) - u, 1 - a - a * s};
  }
  const R s = sign(f - a * u);
  return {s, -s * u - u, 1 - a - a * s};
}

// The same where the mix is not known to the compiler.
template <class R>
FN_HD R mixed(Mix mix, R f, R a, R u) {
  switch (mix) {
    case Mix::over:
      return mixed<Mix::over>(f, a, u);
    case Mix::difference:
      return mixed<Mix::difference>(f, a, u);
    case Mix::over_premultiplied:
      return mixed<Mix::over_premultiplied>(f, a, u);
    default:
      return mixed<Mix::difference_premultiplied>(f, a, u);
  }
}
template <class R>
FN_HD Slopes<R> slopes(Mix mix, R f, R a, R u) {
  switch (mix) {
    case Mix::over:
      return slopes<Mix::over>(f, a, u);
    case Mix::difference:
      return slopes<Mix::difference>(f, a, u);
    case Mix::over_premultiplied:
      return slopes<Mix::over_premultiplied>(f, a, u);
    default:
      return slopes<Mix::difference_premultiplied>(f, a, u);
  }
}

// ---- places

struct Box {
  Index y0, x0, y1, x1;

  FN_HD bool empty() const { return y1 <= y0 || x1 <= x0; }
  FN_HD Index height() const { return empty() ? 0 : y1 - y0; }
  FN_HD Index width() const { return empty() ? 0 : x1 - x0; }
  FN_HD Index area() const { return height() * width(); }
  FN_HD Box grown(Index r) const { return {y0 - r, x0 - r, y1 + r, x1 + r}; }
  FN_HD Box with(const Box& other) const {
    return {larger(y0, other.y0), larger(x0, other.x0), smaller(y1, other.y1), smaller(x1, other.x1)};
  }
};

// An object as it lies on its image.
struct Placed {
  Index first, h, w;
  Box box;            // where it is drawn, with what lies outside the image
  Box seen;           // of that, what lies inside
  Index top, left;    // of its first pixel, if it is shifted
  double inverse[9];  // from the image's (x, y, 1) to the object's
};

// False if there is no inverse.
FN_HD bool invert(const double* m, double* inverse) {
  const double c0 = m[4] * m[8] - m[5] * m[7], c1 = m[5] * m[6] - m[3] * m[8], c2 = m[3] * m[7] - m[4] * m[6];
  const double determinant = m[0] * c0 + m[1] * c1 + m[2] * c2, scale = 1 / determinant;
  if (!(std::abs(scale) <= 1e300)) return false;  // nor with a NaN
  inverse[0] = c0 * scale;
  inverse[1] = (m[2] * m[7] - m[1] * m[8]) * scale;
  inverse[2] = (m[1] * m[5] - m[2] * m[4]) * scale;
  inverse[3] = c1 * scale;
  inverse[4] = (m[0] * m[8] - m[2] * m[6]) * scale;
  inverse[5] = (m[2] * m[3] - m[0] * m[5]) * scale;
  inverse[6] = c2 * scale;
  inverse[7] = (m[1] * m[6] - m[0] * m[7]) * scale;
  inverse[8] = (m[0] * m[4] - m[1] * m[3]) * scale;
  return true;
}

// The pixels strictly inside the outline of the object, which ends where interpolation has nothing left of it: one
// pixel beyond its outermost pixel centres. An object that reaches the horizon may be anywhere.
FN_HD Box outline(const double* m, Index h, Index w, const Box& image) {
  constexpr double kRounding = 1e-6, kHorizon = 1e-9, kFar = 1e9;
  double low[2] = {kFar, kFar}, high[2] = {-kFar, -kFar};
  for (int corner = 0; corner < 4; ++corner) {
    const double x = corner & 1 ? double(w) : -1.0, y = corner & 2 ? double(h) : -1.0;
    const double depth = m[6] * x + m[7] * y + m[8];
    if (!(depth > kHorizon)) return image;
    for (int axis = 0; axis < 2; ++axis) {
      const double at = (m[3 * axis] * x + m[3 * axis + 1] * y + m[3 * axis + 2]) / depth;
      low[axis] = smaller(low[axis], at);
      high[axis] = larger(high[axis], at);
    }
  }
  for (int axis = 0; axis < 2; ++axis) {  // so that they fit an integer
    low[axis] = larger(low[axis], -kFar);
    high[axis] = smaller(high[axis], kFar);
  }
  return {Index(std::floor(low[1] + kRounding)) + 1, Index(std::floor(low[0] + kRounding)) + 1,
          Index(std::ceil(high[1] - kRounding)), Index(std::ceil(high[0] - kRounding))};
}

// The first object of image b, or for b + 1 the end.
FN_HD Index begin_of(const Composite& how, Index b) {
  if (how.ptr != nullptr) return how.ptr[b];
  return how.B == 1 ? b * how.N : b;
}

// Object n. What cannot be drawn has an empty box: no pixels, or no inverse.
FN_HD Placed placed(const Composite& how, Index n) {
  Placed o{};
  o.first = how.sizes[3 * n];
  o.h = how.sizes[3 * n + 1];
  o.w = how.sizes[3 * n + 2];
  const Box image{0, 0, how.H, how.W};
  if (o.h <= 0 || o.w <= 0) return o;
  if (how.place != nullptr) {
    constexpr Index kFar = Index(1) << 40;
    o.top = smaller(larger(how.place[2 * n], -kFar), kFar);
    o.left = smaller(larger(how.place[2 * n + 1], -kFar), kFar);
    o.box = {o.top, o.left, o.top + o.h, o.left + o.w};
    o.inverse[0] = o.inverse[4] = o.inverse[8] = 1;
    o.inverse[2] = -double(o.left);
    o.inverse[5] = -double(o.top);
  } else {
    if (!invert(how.matrix + 9 * n, o.inverse)) return o;
    o.box = outline(how.matrix + 9 * n, o.h, o.w, image);
  }
  if (how.feather.radius > 0 && how.feather.zero_edge) o.box = o.box.grown(how.feather.radius);
  o.seen = o.box.with(image);
  if (o.seen.empty()) o.seen = {0, 0, 0, 0};
  return o;
}

// The whole box is needed of the mask only within a radius of what is seen of it.
FN_HD Box reach(const Composite& how, const Placed& o) {
  return o.seen.empty() ? o.seen : o.seen.grown(how.feather.radius).with(o.box);
}

// Index i of a row of n, mirrored at its ends without repeating them, as often as it takes.
FN_HD Index mirrored(Index i, Index n) {
  if (n == 1) return 0;
  while (i < 0 || i >= n) i = i < 0 ? -i : 2 * (n - 1) - i;
  return i;
}

// ---- what lies under a pixel of the image

struct Spot {
  double y, x, depth;  // depth: what the homography divides by; not above 0 is behind the horizon
};

FN_HD Spot spot(const double* inverse, Index row, Index column) {
  const double y = double(row), x = double(column);
  const double depth = inverse[6] * x + (inverse[7] * y + inverse[8]), scale = 1 / depth;
  return {(inverse[3] * x + (inverse[4] * y + inverse[5])) * scale,
          (inverse[0] * x + (inverse[1] * y + inverse[2])) * scale, depth};
}

// Two neighbours on an axis of n pixels and what each counts; `slope` is the derivative of the second one's share.
template <class R>
struct Axis {
  Index low, high;
  R share[2];
  R slope[2];
};

// Beyond the ends there is nothing, or, clamped, the last pixel again. A NaN is far outside.
template <class R>
FN_HD Axis<R> axis_of(Sampling sampling, double at, Index n, bool clamped) {
  const double end = double(n);
  at = at > -2 ? (at < end + 1 ? at : end + 1) : -2;
  if (sampling != Sampling::bilinear) {
    const Index i = Index(std::floor(at + 0.5)), inside = i < 0 ? 0 : i >= n ? n - 1 : i;
    return {inside, inside, {i == inside || clamped ? R(1) : R(0), R(0)}, {R(0), R(0)}};
  }
  const Index low = Index(std::floor(at));
  const R part = R(at - double(low));
  Axis<R> axis{low, low + 1, {R(1) - part, part}, {R(-1), R(1)}};
  if (axis.low < 0 || axis.low >= n) {
    axis.low = axis.low < 0 ? 0 : n - 1;
    if (!clamped) axis.share[0] = axis.slope[0] = 0;
  }
  if (axis.high < 0 || axis.high >= n) {
    axis.high = axis.high < 0 ? 0 : n - 1;
    if (!clamped) axis.share[1] = axis.slope[1] = 0;
  }
  return axis;
}

// What a pixel of the image reads of an object: four pixels, some of which may count nothing.
template <class R>
struct Reading {
  Axis<R> y, x;
  double depth, at_y, at_x;

  FN_HD bool nothing() const { return (y.share[0] == 0 && y.share[1] == 0) || (x.share[0] == 0 && x.share[1] == 0); }
};

template <class R>
FN_HD Reading<R> reading(const Composite& how, const Placed& o, Index y, Index x, bool clamped) {
  Spot at = spot(o.inverse, y, x);
  if (!(at.depth > 0)) at = {-2, -2, 1}, clamped = false;
  return {axis_of<R>(how.sampling, at.y, o.h, clamped), axis_of<R>(how.sampling, at.x, o.w, clamped), at.depth, at.y,
          at.x};
}

// The colour beyond an object's edge, where a feather shows it, is that of the edge; premultiplied it is nothing.
FN_HD bool colour_clamped(const Composite& how) { return how.mix == Mix::over || how.mix == Mix::difference; }

// ---- what is stored

using fastnuggets::load;
FN_HD float load(std::uint8_t x) { return float(x); }

template <class S>
struct RealOf {
  using type = typename Compute<S>::type;
};
template <class S>
using Real = typename RealOf<S>::type;

// A mask's value in 0 .. 1.
template <class S>
FN_HD Real<S> share_of(S x) {
  return load(x);
}
template <>
FN_HD float share_of(std::uint8_t x) {
  return float(x) / 255.0f;
}

template <class S>
FN_HD S stored(Real<S> x) {
  return Store<S>::of(x);
}
template <>
FN_HD std::uint8_t stored(float x) {  // to nearest, and within the range; a NaN is 0
  return std::uint8_t(x > 0 ? (x < 255.0f ? x + 0.5f : 255.0f) : 0.0f);
}

// ---- reading an object's pixels

// Where channel c of a pixel of the object is; `pixel` is its number within it.
FN_HD Index place_of(const Composite& how, const Placed& o, Index pixel, Index c) {
  return how.channels_last ? (o.first + pixel) * how.C + c : o.first * how.C + c * o.h * o.w + pixel;
}
FN_HD Index place_in_image(const Composite& how, Index b, Index y, Index x, Index c) {
  return how.channels_last ? ((b * how.H + y) * how.W + x) * how.C + c : ((b * how.C + c) * how.H + y) * how.W + x;
}

// The sum of value(pixel, share) over the four pixels; what counts nothing is not read, it may be a NaN.
template <class R, class Value>
FN_HD R sum_of(const Reading<R>& r, Index w, Value value) {
  R sum = 0;
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      const R share = r.y.share[i] * r.x.share[j];
      if (share != 0) sum += share * value((i ? r.y.high : r.y.low) * w + (j ? r.x.high : r.x.low));
    }
  return sum;
}

template <class S>
FN_HD Real<S> mask_at(const Composite& how, const Placed& o, Index y, Index x) {
  const S* const mask = static_cast<const S*>(how.mask) + o.first;
  if (how.sampling == Sampling::shift) {
    const Index i = y - o.top, j = x - o.left;
    return i >= 0 && i < o.h && j >= 0 && j < o.w ? share_of(mask[i * o.w + j]) : Real<S>(0);
  }
  const Reading<Real<S>> r = reading<Real<S>>(how, o, y, x, false);
  return sum_of(r, o.w, [&](Index pixel) { return share_of(mask[pixel]); });
}

template <class S>
FN_HD Real<S> colour_at(const Composite& how, const Placed& o, const Reading<Real<S>>& r, Index c) {
  const S* const pixels = static_cast<const S*>(how.pixels);
  return sum_of(r, o.w, [&](Index pixel) { return load(pixels[place_of(how, o, pixel, c)]); });
}

// ---- derivatives by the place

// Adds to sums [9] the derivative by the inverse matrix, of a pixel whose reading moves the result by (by_y, by_x).
template <class R>
FN_HD void add_to_inverse(const Reading<R>& at, Index y, Index x, double by_y, double by_x, double* sums) {
  const double along[3] = {double(x) / at.depth, double(y) / at.depth, 1 / at.depth};
  const double by_depth = -(by_x * at.at_x + by_y * at.at_y);
  for (int k = 0; k < 3; ++k) {
    sums[k] += by_x * along[k];
    sums[3 + k] += by_y * along[k];
    sums[6 + k] += by_depth * along[k];
  }
}

// The derivative by a matrix, of that by its inverse: -inverse' g inverse'.
FN_HD void through_inverse(const double* inverse, const double* g, double* out) {
  double half[9];
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) {
      double sum = 0;
      for (int k = 0; k < 3; ++k) sum += inverse[3 * k + i] * g[3 * k + j];
      half[3 * i + j] = sum;
    }
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) {
      double sum = 0;
      for (int k = 0; k < 3; ++k) sum += half[3 * i + k] * inverse[3 * j + k];
      out[3 * i + j] = -sum;
    }
}

}  // namespace fastnuggets::composite

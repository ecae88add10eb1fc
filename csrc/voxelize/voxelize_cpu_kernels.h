// The CPU kernels, for any T. Forward: a unit of work is some planes of one channel of one grid. The atoms of the
// channel are added into one plane that stays in the first-level cache, and each output line is then written once,
// never read. Backward: a unit is one atom, which alone writes its gradients. Neither depends on how units fall on
// threads, so neither do the bits.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "common/cpu.h"
#include "voxelize/voxelize_cpu.h"

namespace fastnuggets {
namespace {

constexpr int kLanes = 8;  // rows are padded to this many voxels, so that loops over them have no remainder

// Calls f(k) for k in [0, n). The index is as wide as a pointer, or the compiler would not see that rows are
// contiguous.
template <class F>
FN_BODY void for_lanes(std::ptrdiff_t n, F f) {
#pragma omp simd
  for (std::ptrdiff_t k = 0; k < n; ++k) f(k);
}

template <class T>
struct WideOf {
  using type = double;
};
template <class R>
struct WideOf<Dual<R>> {
  using type = Dual<double>;
};
template <class T>
using Wide = typename WideOf<T>::type;

FN_BODY double widen(float x) { return x; }
FN_BODY double widen(double x) { return x; }
template <class R>
FN_BODY Dual<double> widen(Dual<R> x) {
  return {double(x.v), double(x.d)};
}

// What a kernel on T is asked for: the value, or the derivative along the tangent.
FN_BODY float result(float x) { return x; }
FN_BODY double result(double x) { return x; }
template <class R>
FN_BODY R result(Dual<R> x) {
  return x.d;
}

// Calls f with the number of voxels of a row as a constant, where it is a usual one: loops without a test for what is
// left over, and sums that stay in registers. 0: it is another. Only floats are worth the code.
template <class T, class F>
FN_BODY void with_known_count(int n, F f) {
  if constexpr (std::is_same_v<T, float>) {
    if (n == kLanes) return f(std::integral_constant<int, kLanes>());
    if (n == 2 * kLanes) return f(std::integral_constant<int, 2 * kLanes>());
    if (n == 3 * kLanes) return f(std::integral_constant<int, 3 * kLanes>());
  }
  f(std::integral_constant<int, 0>());
}

template <class R>
FN_BODY R sum_of_products(const R* a, const R* b, std::ptrdiff_t n) {
  R sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::ptrdiff_t k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}
template <class R>
FN_BODY Dual<R> sum_of_products(const Dual<R>* a, const Dual<R>* b, std::ptrdiff_t n) {
  Dual<R> sum(R(0));
  for (std::ptrdiff_t k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}
template <class R>
FN_BODY R sum_of(const R* a, std::ptrdiff_t n) {
  R sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::ptrdiff_t k = 0; k < n; ++k) sum += a[k];
  return sum;
}
template <class R>
FN_BODY Dual<R> sum_of(const Dual<R>* a, std::ptrdiff_t n) {
  Dual<R> sum(R(0));
  for (std::ptrdiff_t k = 0; k < n; ++k) sum += a[k];
  return sum;
}

// Memory that is handed out piece by piece and kept for the next unit.
template <class T>
class Scratch {
 public:
  T* take(int n) {
    const std::size_t count = std::size_t(n);
    while (block_ < blocks_.size() && used_ + count > blocks_[block_].size) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      const std::size_t size = std::max(count, kBlock);
      blocks_.push_back({std::unique_ptr<T[]>(new T[size]), size});
      used_ = 0;
    }
    used_ += count;
    return blocks_[block_].data.get() + used_ - count;
  }
  void reset() { block_ = used_ = 0; }

 private:
  static constexpr std::size_t kBlock = 1 << 14;
  struct Block {
    std::unique_ptr<T[]> data;
    std::size_t size;
  };
  std::vector<Block> blocks_;
  std::size_t block_ = 0, used_ = 0;
};

// One axis of one entry: functions of the voxel, from `first` on.
template <class T>
struct Axis {
  int first, count;
  T *delta, *value, *slope, *size_slope;  // the last two only for a backward
};

// An entry set out on the grid.
template <class T>
struct Placed {
  Shape<T> shape;
  T weight;
  Axis<T> axis[3];
};

template <class T>
FN_BODY T with_tangent(Real<T> value, const Real<T>* tangent, std::int64_t at) {
  if constexpr (std::is_same_v<T, Real<T>>)
    return value;
  else
    return T(value, tangent == nullptr ? 0 : tangent[at]);
}

template <class T>
FN_BODY T from_double(double value, Real<T> tangent) {
  if constexpr (std::is_same_v<T, Real<T>>)
    return T(value);
  else
    return T(Real<T>(value), tangent);
}

template <Density D, class T>
FN_BODY void fill_axis(Axis<T>& axis, Window w, int n, double h, double p, Real<T> tangent, const Shape<T>& shape,
                       bool rows, bool slopes, Scratch<T>& scratch) {
  // Rows start early or end late to hold whole vectors, where the grid is wide enough; the voxels added have value 0.
  axis.first = w.first;
  axis.count = w.last - w.first + 1;
  const int padded = (axis.count + kLanes - 1) / kLanes * kLanes;
  if (rows) {
    axis.count = std::min(padded, n);
    axis.first = std::min(w.first, n - axis.count);
  }
  axis.delta = scratch.take(padded);
  axis.value = scratch.take(padded);
  const double origin = p - (axis.first - 0.5 * (n - 1)) * h;
  const T zero(Real<T>(0));
  const int inside = w.first - axis.first, inside_end = w.last - axis.first;
  T *delta = axis.delta, *value = axis.value;
  for_lanes(padded, [&](std::ptrdiff_t k) FN_LAMBDA { delta[k] = from_double<T>(origin - double(k) * h, tangent); });
  for_lanes(padded, [&](std::ptrdiff_t k) FN_LAMBDA {
    value[k] = choose(k >= inside && k <= inside_end, axis_value<D>(delta[k], shape, Real<T>(h)), zero);
  });
  if (!slopes) return;
  axis.slope = scratch.take(padded);
  axis.size_slope = scratch.take(padded);
  T *slope = axis.slope, *size_slope = axis.size_slope;
  for_lanes(padded, [&](std::ptrdiff_t k) FN_LAMBDA {
    const AxisSlope<T> s = axis_slope<D>(delta[k], shape, Real<T>(h));
    const bool in = k >= inside && k <= inside_end;
    slope[k] = choose(in, s.position, zero);
    size_slope[k] = choose(in, s.size, zero);
  });
}

// Sets entry (n, c) out on grid g; false if it contributes nothing there. `planes` narrows the first axis.
template <Density D, class T>
FN_BODY bool place(const Job<Real<T>>& job, std::int64_t n, std::int64_t g, std::int64_t c, bool slopes, Window planes,
                   Scratch<T>& scratch, Placed<T>& placed) {
  using R = Real<T>;
  constexpr bool kSized = D != Density::nearest && D != Density::trilinear;
  const Molecules<R>& m = job.m;
  const std::int64_t at = n * m.C + c;
  const R size = kSized ? entry(m.size, n, c) : R(1);
  if (!(size > 0)) return false;
  double p[3];
  box_position(m, n, g, p);
  placed.weight = with_tangent<T>(entry(m.weight, n, c), job.tangent.weight, at);
  placed.shape = make_shape<D>(with_tangent<T>(size, job.tangent.size, at),
                               with_tangent<T>(entry(m.omega, n, c), job.tangent.omega, at), job.grid.cutoff);
  Window w[3];
  for (int i = 0; i < 3; ++i) {
    w[i] = window<D>(p[i], int(job.grid.shape[i]), job.grid.spacing[i], placed.shape.reach);
    if (w[i].first > w[i].last) return false;
  }
  if (w[0].first > planes.last || w[0].last < planes.first) return false;
  w[0] = {std::max(w[0].first, planes.first), std::min(w[0].last, planes.last)};
  const R* tangent = job.tangent.coords == nullptr ? nullptr : job.tangent.coords + (n * m.K + g % m.K) * 3;
  for (int i = 0; i < 3; ++i)
    fill_axis<D>(placed.axis[i], w[i], int(job.grid.shape[i]), job.grid.spacing[i], p[i],
                 tangent == nullptr ? R(0) : tangent[i], placed.shape, i == 2, slopes, scratch);
  return true;
}

// Calls f(row, q, envelope, y) for the rows of plane x that the atom reaches: q = the squared distance in x and y,
// envelope = the product of the two axis functions.
template <Density D, class T, class F>
FN_BODY void for_rows(const Placed<T>& a, int x, F f) {
  constexpr bool kRound = !(D == Density::nearest || D == Density::trilinear || D == Density::pyuul);
  const T dx = a.axis[0].delta[x], ex = a.axis[0].value[x];
  for (int y = 0; y < a.axis[1].count; ++y) {
    const T dy = a.axis[1].delta[y];
    const T q = dx * dx + dy * dy;
    if (kRound && value_of(q) > a.shape.reach_squared) continue;
    f(a.axis[1].first + y, q, ex * a.axis[1].value[y], y);
  }
}

// An atom's values along one row: of voxel k of its z axis.
template <Density D, class T>
struct Row {
  T q, envelope;
  Shape<T> shape;
  const T *delta, *value;

  FN_BODY Row(const Placed<T>& a, T q_, T envelope_)
      : q(q_), envelope(envelope_), shape(a.shape), delta(a.axis[2].delta), value(a.axis[2].value) {}
  FN_BODY T operator[](std::ptrdiff_t k) const {
    if constexpr (is_product(D))
      return envelope * value[k];
    else
      return radial_value<D>(q + delta[k] * delta[k], envelope * value[k], shape);
  }
};

template <Density D, Combine rule, int kCount, class T>
FN_BODY void add_to_plane(const Placed<T>& a, int x, T* plane, std::int64_t width) {
  for_rows<D>(a, x, [&](int row, T q, T envelope, int) FN_LAMBDA {
    T* line = plane + row * width + a.axis[2].first;
    // Product densities carry the weight in the envelope: one multiplication a row.
    const T scaled = is_product(D) ? a.weight * envelope : envelope;
    const T weight = is_product(D) ? T(Real<T>(1)) : a.weight;
    const Row<D, T> values(a, q, scaled);
    for_lanes(kCount > 0 ? kCount : a.axis[2].count, [&](std::ptrdiff_t k) FN_LAMBDA {
      line[k] = combined(rule, line[k], is_product(D) ? values[k] : weight * values[k]);
    });
  });
}

template <Density D, class T>
FN_BODY void add_to_plane(const Placed<T>& a, int x, Combine rule, T* plane, std::int64_t width) {
  if (rule == Combine::sum)
    with_known_count<T>(a.axis[2].count, [&](auto count) FN_LAMBDA {
      add_to_plane<D, Combine::sum, decltype(count)::value>(a, x, plane, width);
    });
  else if (rule == Combine::max)
    add_to_plane<D, Combine::max, 0>(a, x, plane, width);
  else if (rule == Combine::set_union)
    add_to_plane<D, Combine::set_union, 0>(a, x, plane, width);
  else
    add_to_plane<D, Combine::magnitude, 0>(a, x, plane, width);
}

template <class T>
FN_BODY const Real<T>* results(const T* plane, std::int64_t n, std::vector<Real<T>>& buffer) {
  if constexpr (std::is_same_v<T, Real<T>>) {
    return plane;
  } else {
    buffer.resize(n);
    for (std::int64_t i = 0; i < n; ++i) buffer[i] = result(plane[i]);
    return buffer.data();
  }
}

template <Density D, class T>
FN_BODY void forward_body(const Job<Real<T>>& job, Unit unit, Sink<Real<T>>& sink) {
  static thread_local Scratch<T> scratch;
  static thread_local std::vector<Placed<T>> atoms;
  static thread_local std::vector<T> plane;
  static thread_local std::vector<Real<T>> buffer;
  const Molecules<Real<T>>& m = job.m;
  const std::int64_t height = job.grid.shape[1], width = job.grid.shape[2];
  scratch.reset();
  atoms.clear();
  plane.assign(height * width, T(Real<T>(0)));
  const std::int64_t b = unit.g / m.K;
  for (std::int64_t n = m.ptr[b]; n < m.ptr[b + 1]; ++n) {
    if (m.channel != nullptr && m.channel[n] != unit.c) continue;
    Placed<T> placed;
    if (place<D>(job, n, unit.g, unit.c, false, unit.planes, scratch, placed)) atoms.push_back(placed);
  }
  for (int d = unit.planes.first; d <= unit.planes.last; ++d) {
    int first = int(height), last = -1;
    for (const Placed<T>& a : atoms) {
      const int x = d - a.axis[0].first;
      if (x < 0 || x >= a.axis[0].count) continue;
      add_to_plane<D>(a, x, job.grid.combine, plane.data(), width);
      first = std::min(first, a.axis[1].first);
      last = std::max(last, a.axis[1].first + a.axis[1].count - 1);
    }
    if (last < first) continue;
    T* touched = plane.data() + first * width;
    const std::int64_t count = (last - first + 1) * width;
    sink.rows(d, first, last, results(touched, count, buffer));
    std::fill(touched, touched + count, T(Real<T>(0)));
  }
}

// ---- backward

template <class T>
struct Sums {
  Wide<T> position[3], weight, size, omega;
};

// What the loss gains for each voxel of a row if this atom's value grows there: the gradient of the grid, times what
// the other atoms of the channel leave of it. `own` is room for the atom's values.
template <Density D, class T>
FN_BODY void hide_behind_others(const Placed<T>& a, int x, int row, T q, T envelope, Combine rule,
                                const std::vector<Placed<T>>& others, std::size_t own_rank, T* own, T* gradient) {
  const Axis<T>& z = a.axis[2];
  const int plane = a.axis[0].first + x;
  const Row<D, T> values(a, q, envelope);
  for_lanes(z.count, [&](std::ptrdiff_t k) FN_LAMBDA {
    own[k] = a.weight * values[k];
    gradient[k] *= factor_of_own(rule, own[k]);
  });
  if (rule == Combine::magnitude) return;
  for (std::size_t i = 0; i < others.size(); ++i) {
    const Placed<T>& o = others[i];
    const int ox = plane - o.axis[0].first, oy = row - o.axis[1].first;
    if (ox < 0 || ox >= o.axis[0].count || oy < 0 || oy >= o.axis[1].count) continue;
    const T dx = o.axis[0].delta[ox], dy = o.axis[1].delta[oy];
    const Row<D, T> other(o, dx * dx + dy * dy, o.axis[0].value[ox] * o.axis[1].value[oy]);
    const int from = std::max(z.first, o.axis[2].first);
    const int to = std::min(z.first + z.count, o.axis[2].first + o.axis[2].count);
    const T* mine = own + (from - z.first);
    const T weight = o.weight;
    T* left = gradient + (from - z.first);
    const std::ptrdiff_t skip = from - o.axis[2].first;
    const bool first = i < own_rank;
    for_lanes(to - from, [&](std::ptrdiff_t k) FN_LAMBDA {
      left[k] = factor_of_other(rule, left[k], mine[k], weight * other[k + skip], first);
    });
  }
}

// Sums of each voxel of a row over the rows of a plane. Where the compiler knows how many there are they stay in
// registers; 0: it does not, they are in `buffer`, n for each sum.
template <int kCount, int kSums, class T>
struct RowSums {
  T known[kSums][kCount > 0 ? kCount : 1];
  T* buffer;
  int n;

  FN_BODY RowSums(T* buffer_, int n_) : buffer(buffer_), n(n_) {
    for (int i = 0; i < kSums; ++i) std::fill((*this)[i], (*this)[i] + n, T(Real<T>(0)));
  }
  FN_BODY T* operator[](int i) { return kCount > 0 ? known[i] : buffer + i * n; }
};

// Row sums over a plane, then one weighted sum of them: two operations a voxel.
template <Density D, int kCount, class T, class G>
FN_BODY void add_product(const Placed<T>& a, int x, bool sizes, T* buffer, G gradient_of, Sums<T>& sums) {
  const Axis<T>&ax = a.axis[0], &ay = a.axis[1], &az = a.axis[2];
  const int n = kCount > 0 ? kCount : az.count;
  RowSums<kCount, 3, T> of_rows(buffer, n);
  T *plain = of_rows[0], *sloped = of_rows[1], *sized = of_rows[2];
  for_rows<D>(a, x, [&](int row, T q, T envelope, int y) FN_LAMBDA {
    const auto* g = gradient_of(row, q, envelope);
    const T value = ay.value[y], slope = ay.slope[y];
    for_lanes(n, [&](std::ptrdiff_t k) FN_LAMBDA {
      plain[k] += value * T(g[k]);
      sloped[k] += slope * T(g[k]);
    });
    if (!sizes) return;
    const T size_slope = ay.size_slope[y];
    for_lanes(n, [&](std::ptrdiff_t k) FN_LAMBDA { sized[k] += size_slope * T(g[k]); });
  });
  const T values = sum_of_products(plain, az.value, n);
  sums.weight += widen(ax.value[x] * values);
  sums.position[0] += widen(ax.slope[x] * values);
  sums.position[1] += widen(ax.value[x] * sum_of_products(sloped, az.value, n));
  sums.position[2] += widen(ax.value[x] * sum_of_products(plain, az.slope, n));
  if (!sizes) return;
  sums.size += widen(ax.size_slope[x] * values +
                     ax.value[x] * (sum_of_products(sized, az.value, n) + sum_of_products(plain, az.size_slope, n)));
}

template <Density D, int kCount, bool sizes, class T, class G>
FN_BODY void add_radial(const Placed<T>& a, int x, T* buffer, G gradient_of, Sums<T>& sums) {
  const Axis<T>&ay = a.axis[1], &az = a.axis[2];
  const int n = kCount > 0 ? kCount : az.count;
  RowSums<kCount, sizes ? 5 : 2, T> of_rows(buffer, n);
  T *by_q = of_rows[0], *by_y = of_rows[1];
  T *value = sizes ? of_rows[2] : nullptr, *size = sizes ? of_rows[3] : nullptr, *omega = sizes ? of_rows[4] : nullptr;
  const T *dz = az.delta, *ez = az.value;
  const Shape<T> shape = a.shape;
  for_rows<D>(a, x, [&](int row, T q, T envelope, int y) FN_LAMBDA {
    const auto* g = gradient_of(row, q, envelope);
    const T dy = ay.delta[y];
    for_lanes(n, [&](std::ptrdiff_t k) FN_LAMBDA {
      const RadialSlope<T> s = radial_slope<D>(q + dz[k] * dz[k], envelope * ez[k], shape);
      const T t = T(g[k]) * s.q;
      by_q[k] += t;
      by_y[k] += dy * t;
      if constexpr (sizes) {
        value[k] += T(g[k]) * s.value;
        size[k] += T(g[k]) * s.size;
        omega[k] += T(g[k]) * s.omega;
      }
    });
  });
  const T two(Real<T>(2));
  sums.position[0] += widen(two * a.axis[0].delta[x] * sum_of(by_q, n));
  sums.position[1] += widen(two * sum_of(by_y, n));
  sums.position[2] += widen(two * sum_of_products(by_q, az.delta, n));
  if constexpr (sizes) {
    sums.weight += widen(sum_of(value, n));
    sums.size += widen(sum_of(size, n));
    sums.omega += widen(sum_of(omega, n));
  }
}

template <Density D, int kCount, class T, class G>
FN_BODY void add_gradient(const Placed<T>& a, int x, bool sizes, T* buffer, G gradient_of, Sums<T>& sums) {
  if constexpr (is_product(D))
    add_product<D, kCount>(a, x, sizes, buffer, gradient_of, sums);
  else if (sizes)
    add_radial<D, kCount, true>(a, x, buffer, gradient_of, sums);
  else
    add_radial<D, kCount, false>(a, x, buffer, gradient_of, sums);
}

template <class T>
struct BackwardScratch {
  Scratch<T> tables;
  std::vector<T> planes, hidden;
  std::vector<Real<T>> row;
  std::vector<Placed<T>> others;
};

template <Density D, class T>
FN_BODY void backward_entry(const Job<Real<T>>& job, const GradientRows<Real<T>>& grad, const Gradients<Real<T>>& to,
                            std::int64_t b, std::int64_t n, std::int64_t g, std::int64_t c, BackwardScratch<T>& scratch,
                            Sums<T>& sums) {
  const Molecules<Real<T>>& m = job.m;
  const Grid& grid = job.grid;
  const bool sizes = to.weight != nullptr || to.size != nullptr || to.omega != nullptr;
  const Window all{0, int(grid.shape[0]) - 1};
  scratch.tables.reset();
  Placed<T> own;
  if (!place<D>(job, n, g, c, is_product(D), all, scratch.tables, own)) return;
  std::size_t rank = 0;
  if (grid.combine != Combine::sum) {
    scratch.others.clear();
    for (std::int64_t other = m.ptr[b]; other < m.ptr[b + 1]; ++other) {
      if (other == n) rank = scratch.others.size();
      if (other == n || (m.channel != nullptr && m.channel[other] != c)) continue;
      Placed<T> placed;
      if (place<D>(job, other, g, c, false, all, scratch.tables, placed)) scratch.others.push_back(placed);
    }
  }
  const int count = own.axis[2].count;
  scratch.planes.resize(5 * count);
  scratch.hidden.resize(2 * count);
  scratch.row.resize(count);
  const std::int64_t channel_at = (g * m.C + c) * grid.shape[0];
  for (int x = 0; x < own.axis[0].count; ++x) {
    const std::int64_t plane_at = (channel_at + own.axis[0].first + x) * grid.shape[1];
    const std::int64_t next_plane = x + 1 < own.axis[0].count ? grid.shape[1] * grid.shape[2] : 0;
    const auto row_of = [&](int row) FN_LAMBDA {
      const std::int64_t at = (plane_at + row) * grid.shape[2] + own.axis[2].first;
      grad.prefetch(at + next_plane, count);
      return grad.row(at, count, scratch.row.data());
    };
    const auto plain = [&](int row, T, T) FN_LAMBDA { return row_of(row); };
    const auto hidden = [&](int row, T q, T envelope) FN_LAMBDA -> const T* {
      const Real<T>* g_row = row_of(row);
      for (int k = 0; k < count; ++k) scratch.hidden[k] = T(g_row[k]);
      hide_behind_others<D>(own, x, row, q, envelope, grid.combine, scratch.others, rank, scratch.hidden.data() + count,
                            scratch.hidden.data());
      return scratch.hidden.data();
    };
    T* buffer = scratch.planes.data();
    if (grid.combine == Combine::sum)
      with_known_count<T>(count, [&](auto known) FN_LAMBDA {
        add_gradient<D, decltype(known)::value>(own, x, sizes, buffer, plain, sums);
      });
    else
      add_gradient<D, 0>(own, x, sizes, buffer, hidden, sums);
  }
  const Wide<T> weight = widen(own.weight);
  for (Wide<T>& p : sums.position) p *= weight;
  sums.size *= weight;
  sums.omega *= weight;
}

template <Density D, class T>
FN_BODY void backward_body(const Job<Real<T>>& job, const GradientRows<Real<T>>& grad, const Gradients<Real<T>>& to,
                           std::int64_t b, std::int64_t n) {
  using R = Real<T>;
  static thread_local BackwardScratch<T> scratch;
  const Molecules<R>& m = job.m;
  const std::int64_t first = m.channel != nullptr ? m.channel[n] : 0;
  const std::int64_t last = m.channel != nullptr ? first : m.C - 1;
  for (std::int64_t k = 0; k < m.K; ++k) {
    Wide<T> position[3] = {0.0, 0.0, 0.0};
    for (std::int64_t c = first; c <= last; ++c) {
      Sums<T> sums{{0.0, 0.0, 0.0}, 0.0, 0.0, 0.0};
      backward_entry<D>(job, grad, to, b, n, b * m.K + k, c, scratch, sums);
      for (int i = 0; i < 3; ++i) position[i] += sums.position[i];
      // Entries are the atom's own: adding up over its poses needs no lock.
      const std::int64_t at = n * m.C + c;
      if (to.weight != nullptr) to.weight[at] += R(result(sums.weight));
      if (to.size != nullptr) to.size[at] += R(result(sums.size));
      if (to.omega != nullptr) to.omega[at] += R(result(sums.omega));
    }
    if (to.coords != nullptr)
      for (int i = 0; i < 3; ++i) to.coords[(n * m.K + k) * 3 + i] = R(result(position[i]));
  }
}

// ---- one clone an instruction set; only float has vector formulas

#define FN_CLONE(NAME, TARGET)                                                                \
  template <Density D, class T>                                                               \
  TARGET void forward_##NAME(const Job<Real<T>>& job, Unit unit, Sink<Real<T>>& sink) {       \
    forward_body<D, T>(job, unit, sink);                                                      \
  }                                                                                           \
  template <Density D, class T>                                                               \
  TARGET void backward_##NAME(const Job<Real<T>>& job, const GradientRows<Real<T>>& grad,     \
                              const Gradients<Real<T>>& to, std::int64_t b, std::int64_t n) { \
    backward_body<D, T>(job, grad, to, b, n);                                                 \
  }
FN_CLONE(generic, )
FN_CLONE(avx2, FN_TARGET_AVX2)
FN_CLONE(avx512, FN_TARGET_AVX512)
#undef FN_CLONE

template <Density D, class T>
Kernels<T> kernels_of() {
  if constexpr (std::is_same_v<T, float>) {
    if (simd() == Simd::avx512) return {&forward_avx512<D, T>, &backward_avx512<D, T>};
    if (simd() == Simd::avx2) return {&forward_avx2<D, T>, &backward_avx2<D, T>};
  }
  return {&forward_generic<D, T>, &backward_generic<D, T>};
}

template <class T>
Kernels<T> find_kernels(Density density) {
  switch (density) {
    case Density::nearest:
      return kernels_of<Density::nearest, T>();
    case Density::trilinear:
      return kernels_of<Density::trilinear, T>();
    case Density::sphere:
      return kernels_of<Density::sphere, T>();
    case Density::gaussian:
      return kernels_of<Density::gaussian, T>();
    case Density::wave:
      return kernels_of<Density::wave, T>();
    case Density::molgrid:
      return kernels_of<Density::molgrid, T>();
    case Density::molvoxel:
      return kernels_of<Density::molvoxel, T>();
    case Density::pyuul:
      return kernels_of<Density::pyuul, T>();
    case Density::moleculekit:
      return kernels_of<Density::moleculekit, T>();
  }
  TORCH_CHECK(false, "voxelize: no such density");
}

}  // namespace
}  // namespace fastnuggets

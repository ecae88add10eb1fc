// CPU kernels of voxelize.
//
// Forward: a unit of work is some planes of one channel of one grid. The atoms of the channel are added into one plane
// that stays in the first-level cache, and each output line is then written once, never read. Backward: a unit is one
// atom, which alone writes its gradients. Neither depends on how units fall on threads, so neither do the bits.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <memory>
#include <vector>

#include "common/cpu.h"
#include "voxelize/voxelize_args.h"
#include "voxelize/voxelize_math.h"

#define FN_BODY inline __attribute__((always_inline))
#define FN_LAMBDA __attribute__((always_inline))

namespace fastnuggets {
namespace {

constexpr int kLanes = 16;  // rows are padded to this many voxels, so that loops over them have no remainder

// Calls f(k) for k in [0, n), in blocks that the compiler turns into vectors.
template <class F>
FN_BODY void for_lanes(int n, F f) {
  int k = 0;
  for (; k + kLanes <= n; k += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) f(k + j);
  }
  for (; k < n; ++k) f(k);
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

template <class R>
FN_BODY R sum_of_products(const R* a, const R* b, int n) {
  R sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}
template <class R>
FN_BODY Dual<R> sum_of_products(const Dual<R>* a, const Dual<R>* b, int n) {
  Dual<R> sum(R(0));
  for (int k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}
template <class R>
FN_BODY R sum_of(const R* a, int n) {
  R sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < n; ++k) sum += a[k];
  return sum;
}
template <class R>
FN_BODY Dual<R> sum_of(const Dual<R>* a, int n) {
  Dual<R> sum(R(0));
  for (int k = 0; k < n; ++k) sum += a[k];
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

template <class R>
struct Job {
  Molecules<R> m;
  Tangent<R> tangent;
  Grid grid;
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
  for_lanes(padded, [&](int k) FN_LAMBDA { delta[k] = from_double<T>(origin - k * h, tangent); });
  for_lanes(padded, [&](int k) FN_LAMBDA {
    value[k] = choose(k >= inside && k <= inside_end, axis_value<D>(delta[k], shape, Real<T>(h)), zero);
  });
  if (!slopes) return;
  axis.slope = scratch.take(padded);
  axis.size_slope = scratch.take(padded);
  T *slope = axis.slope, *size_slope = axis.size_slope;
  for_lanes(padded, [&](int k) FN_LAMBDA {
    const AxisSlope<T> s = axis_slope<D>(delta[k], shape, Real<T>(h));
    const bool in = k >= inside && k <= inside_end;
    slope[k] = choose(in, s.position, zero);
    size_slope[k] = choose(in, s.size, zero);
  });
}

// Sets entry (n, c) out on grid g; false if it contributes nothing there. `planes` narrows the first axis.
template <Density D, class T>
FN_BODY bool place(const Job<Real<T>>& job, std::int64_t n, std::int64_t g, std::int64_t c, bool slopes,
                   Window planes, Scratch<T>& scratch, Placed<T>& placed) {
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

// The atom's values in one row, one at a time: f of voxel k of its z axis.
template <Density D, class T>
FN_BODY T value_at(const Placed<T>& a, T q, T envelope, int k) {
  const T ez = a.axis[2].value[k];
  if constexpr (is_product(D)) {
    return envelope * ez;
  } else {
    const T dz = a.axis[2].delta[k];
    return radial_value<D>(q + dz * dz, envelope * ez, a.shape);
  }
}

template <Density D, Combine rule, class T>
FN_BODY void add_to_plane(const Placed<T>& a, int x, T* plane, std::int64_t width) {
  for_rows<D>(a, x, [&](int row, T q, T envelope, int) FN_LAMBDA {
    T* line = plane + row * width + a.axis[2].first;
    // Product densities carry the weight in the envelope: one multiplication a row.
    const T scaled = is_product(D) ? a.weight * envelope : envelope;
    const T weight = is_product(D) ? T(Real<T>(1)) : a.weight;
    for_lanes(a.axis[2].count, [&](int k) FN_LAMBDA {
      const T value = value_at<D>(a, q, scaled, k);
      line[k] = combined(rule, line[k], is_product(D) ? value : weight * value);
    });
  });
}

template <Density D, class T>
FN_BODY void add_to_plane(const Placed<T>& a, int x, Combine rule, T* plane, std::int64_t width) {
  if (rule == Combine::sum)
    add_to_plane<D, Combine::sum>(a, x, plane, width);
  else if (rule == Combine::max)
    add_to_plane<D, Combine::max>(a, x, plane, width);
  else
    add_to_plane<D, Combine::set_union>(a, x, plane, width);
}

// Takes the planes of one channel of one grid, in ascending order; rows outside [first, last] are zero.
template <class R>
struct Sink {
  virtual ~Sink() = default;
  virtual void rows(std::int64_t plane, int first, int last, const R* values) = 0;
};

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

struct Unit {
  std::int64_t g, c;
  Window planes;
};

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
// the other atoms of the channel leave of it.
template <Density D, class T>
FN_BODY void hide_behind_others(const Placed<T>& a, int x, int row, T q, T envelope, Combine rule,
                                const std::vector<Placed<T>>& others, std::size_t own_rank, T* gradient) {
  const Axis<T>& z = a.axis[2];
  const int plane = a.axis[0].first + x;
  for (int k = 0; k < z.count; ++k)
    gradient[k] *= factor_of_own(rule, a.weight * value_at<D>(a, q, envelope, k));
  for (std::size_t i = 0; i < others.size(); ++i) {
    const Placed<T>& o = others[i];
    const int ox = plane - o.axis[0].first, oy = row - o.axis[1].first;
    if (ox < 0 || ox >= o.axis[0].count || oy < 0 || oy >= o.axis[1].count) continue;
    const T dx = o.axis[0].delta[ox], dy = o.axis[1].delta[oy];
    const T other_q = dx * dx + dy * dy;
    const T other_envelope = o.axis[0].value[ox] * o.axis[1].value[oy];
    const int from = std::max(z.first, o.axis[2].first);
    const int to = std::min(z.first + z.count, o.axis[2].first + o.axis[2].count);
    for (int v = from; v < to; ++v) {
      const int k = v - z.first;
      const T own = a.weight * value_at<D>(a, q, envelope, k);
      const T other = o.weight * value_at<D>(o, other_q, other_envelope, v - o.axis[2].first);
      gradient[k] = factor_of_other(rule, gradient[k], own, other, i < own_rank);
    }
  }
}

// Row sums over a plane, then one weighted sum of them: two operations a voxel.
template <Density D, class T, class G>
FN_BODY void add_product(const Placed<T>& a, int x, bool sizes, T* buffer, G gradient_of, Sums<T>& sums) {
  const Axis<T>&ax = a.axis[0], &ay = a.axis[1], &az = a.axis[2];
  const int n = az.count;
  T *plain = buffer, *sloped = buffer + n, *sized = buffer + 2 * n;
  std::fill(buffer, buffer + 3 * n, T(Real<T>(0)));
  for_rows<D>(a, x, [&](int row, T q, T envelope, int y) FN_LAMBDA {
    const auto* g = gradient_of(row, q, envelope);
    const T value = ay.value[y], slope = ay.slope[y];
    for_lanes(n, [&](int k) FN_LAMBDA {
      plain[k] += value * T(g[k]);
      sloped[k] += slope * T(g[k]);
    });
    if (!sizes) return;
    const T size_slope = ay.size_slope[y];
    for_lanes(n, [&](int k) FN_LAMBDA { sized[k] += size_slope * T(g[k]); });
  });
  const T values = sum_of_products(plain, az.value, n);
  sums.weight += widen(ax.value[x] * values);
  sums.position[0] += widen(ax.slope[x] * values);
  sums.position[1] += widen(ax.value[x] * sum_of_products(sloped, az.value, n));
  sums.position[2] += widen(ax.value[x] * sum_of_products(plain, az.slope, n));
  if (!sizes) return;
  sums.size += widen(ax.size_slope[x] * values + ax.value[x] * (sum_of_products(sized, az.value, n) +
                                                                  sum_of_products(plain, az.size_slope, n)));
}

template <Density D, class T, class G>
FN_BODY void add_radial(const Placed<T>& a, int x, bool sizes, T* buffer, G gradient_of, Sums<T>& sums) {
  const Axis<T>&ay = a.axis[1], &az = a.axis[2];
  const int n = az.count;
  T *by_q = buffer, *by_y = buffer + n, *value = buffer + 2 * n, *size = buffer + 3 * n, *omega = buffer + 4 * n;
  std::fill(buffer, buffer + 5 * n, T(Real<T>(0)));
  for_rows<D>(a, x, [&](int row, T q, T envelope, int y) FN_LAMBDA {
    const auto* g = gradient_of(row, q, envelope);
    const T dy = ay.delta[y];
    const T *dz = az.delta, *ez = az.value;
    if (sizes) {
      for_lanes(n, [&](int k) FN_LAMBDA {
        const RadialSlope<T> s = radial_slope<D>(q + dz[k] * dz[k], envelope * ez[k], a.shape);
        const T t = T(g[k]) * s.q;
        by_q[k] += t;
        by_y[k] += dy * t;
        value[k] += T(g[k]) * s.value;
        size[k] += T(g[k]) * s.size;
        omega[k] += T(g[k]) * s.omega;
      });
    } else {
      for_lanes(n, [&](int k) FN_LAMBDA {
        const RadialSlope<T> s = radial_slope<D>(q + dz[k] * dz[k], envelope * ez[k], a.shape);
        const T t = T(g[k]) * s.q;
        by_q[k] += t;
        by_y[k] += dy * t;
      });
    }
  });
  const T two(Real<T>(2));
  sums.position[0] += widen(two * a.axis[0].delta[x] * sum_of(by_q, n));
  sums.position[1] += widen(two * sum_of(by_y, n));
  sums.position[2] += widen(two * sum_of_products(by_q, az.delta, n));
  if (!sizes) return;
  sums.weight += widen(sum_of(value, n));
  sums.size += widen(sum_of(size, n));
  sums.omega += widen(sum_of(omega, n));
}

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
  FN_BODY const R* row(std::int64_t at, int n, R* buffer) const {
    if (dtype == c10::CppTypeToScalarType<R>::value) return static_cast<const R*>(data) + at;
    switch (dtype) {
      case at::kHalf: return convert<at::Half>(data, at, n, buffer);
      case at::kBFloat16: return convert<at::BFloat16>(data, at, n, buffer);
      case at::kFloat: return convert<float>(data, at, n, buffer);
      default: return convert<double>(data, at, n, buffer);
    }
  }
};

template <class T>
struct BackwardScratch {
  Scratch<T> tables;
  std::vector<T> planes, hidden;
  std::vector<Real<T>> row;
  std::vector<Placed<T>> others;
};

template <Density D, class T>
FN_BODY void backward_entry(const Job<Real<T>>& job, const GradientRows<Real<T>>& grad,
                            const Gradients<Real<T>>& to, std::int64_t b, std::int64_t n, std::int64_t g,
                            std::int64_t c, BackwardScratch<T>& scratch, Sums<T>& sums) {
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
  scratch.hidden.resize(count);
  scratch.row.resize(count);
  const std::int64_t channel_at = (g * m.C + c) * grid.shape[0];
  for (int x = 0; x < own.axis[0].count; ++x) {
    const std::int64_t plane_at = (channel_at + own.axis[0].first + x) * grid.shape[1];
    const auto row_of = [&](int row) FN_LAMBDA {
      return grad.row((plane_at + row) * grid.shape[2] + own.axis[2].first, count, scratch.row.data());
    };
    const auto plain = [&](int row, T, T) FN_LAMBDA { return row_of(row); };
    const auto hidden = [&](int row, T q, T envelope) FN_LAMBDA -> const T* {
      const Real<T>* g_row = row_of(row);
      for (int k = 0; k < count; ++k) scratch.hidden[k] = T(g_row[k]);
      hide_behind_others<D>(own, x, row, q, envelope, grid.combine, scratch.others, rank, scratch.hidden.data());
      return scratch.hidden.data();
    };
    if constexpr (is_product(D)) {
      if (grid.combine == Combine::sum)
        add_product<D>(own, x, sizes, scratch.planes.data(), plain, sums);
      else
        add_product<D>(own, x, sizes, scratch.planes.data(), hidden, sums);
    } else {
      if (grid.combine == Combine::sum)
        add_radial<D>(own, x, sizes, scratch.planes.data(), plain, sums);
      else
        add_radial<D>(own, x, sizes, scratch.planes.data(), hidden, sums);
    }
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

template <class T>
using ForwardKernel = void (*)(const Job<Real<T>>&, Unit, Sink<Real<T>>&);
template <class T>
using BackwardKernel = void (*)(const Job<Real<T>>&, const GradientRows<Real<T>>&, const Gradients<Real<T>>&,
                                std::int64_t, std::int64_t);

#define FN_CLONE(NAME, TARGET)                                                                                       \
  template <Density D, class T>                                                                                      \
  TARGET void forward_##NAME(const Job<Real<T>>& job, Unit unit, Sink<Real<T>>& sink) {                              \
    forward_body<D, T>(job, unit, sink);                                                                             \
  }                                                                                                                  \
  template <Density D, class T>                                                                                      \
  TARGET void backward_##NAME(const Job<Real<T>>& job, const GradientRows<Real<T>>& grad,                            \
                              const Gradients<Real<T>>& to, std::int64_t b, std::int64_t n) {                        \
    backward_body<D, T>(job, grad, to, b, n);                                                                        \
  }
FN_CLONE(generic, )
FN_CLONE(avx2, FN_TARGET_AVX2)
FN_CLONE(avx512, FN_TARGET_AVX512)
#undef FN_CLONE

template <class T>
struct Kernels {
  ForwardKernel<T> forward;
  BackwardKernel<T> backward;
};

template <Density D, class T>
Kernels<T> kernels_of() {
  if constexpr (std::is_same_v<T, float>) {
    if (simd() == Simd::avx512) return {&forward_avx512<D, T>, &backward_avx512<D, T>};
    if (simd() == Simd::avx2) return {&forward_avx2<D, T>, &backward_avx2<D, T>};
  }
  return {&forward_generic<D, T>, &backward_generic<D, T>};
}

template <class T>
Kernels<T> kernels(Density density) {
  switch (density) {
    case Density::nearest: return kernels_of<Density::nearest, T>();
    case Density::trilinear: return kernels_of<Density::trilinear, T>();
    case Density::sphere: return kernels_of<Density::sphere, T>();
    case Density::gaussian: return kernels_of<Density::gaussian, T>();
    case Density::wave: return kernels_of<Density::wave, T>();
    case Density::molgrid: return kernels_of<Density::molgrid, T>();
    case Density::molvoxel: return kernels_of<Density::molvoxel, T>();
    case Density::pyuul: return kernels_of<Density::pyuul, T>();
    case Density::moleculekit: return kernels_of<Density::moleculekit, T>();
  }
  TORCH_CHECK(false, "voxelize: no such density");
}

// ---- where rows go

// Converts and writes rows to the output, and zeros wherever no row comes.
template <class R>
class DenseSink final : public Sink<R> {
 public:
  DenseSink(at::Tensor& out, const Grid& grid, bool streaming)
      : data_(static_cast<char*>(out.mutable_data_ptr())),
        dtype_(out.scalar_type()),
        bytes_(std::int64_t(out.element_size())),
        grid_(grid),
        streaming_(streaming) {}

  void begin(std::int64_t volume, Window planes) {
    channel_ = volume * grid_.shape[0];
    written_ = at(planes.first, 0);
    end_ = at(planes.last + 1, 0);
  }
  void rows(std::int64_t plane, int first, int last, const R* values) override {
    const std::int64_t start = at(plane, first);
    const std::int64_t count = (last - first + 1) * grid_.shape[2];
    zeros(start);
    copy(data_ + start, values, count);
    written_ = start + count * bytes_;
  }
  void end() {
    zeros(end_);
    if (streaming_) stream_end();
  }

 private:
  std::int64_t at(std::int64_t plane, std::int64_t row) const {
    return ((channel_ + plane) * grid_.shape[1] + row) * grid_.shape[2] * bytes_;
  }
  void zeros(std::int64_t until) {
    if (streaming_)
      stream_zeros(data_ + written_, std::size_t(until - written_));
    else
      std::memset(data_ + written_, 0, std::size_t(until - written_));
  }
  template <class S>
  const char* converted(const R* values, std::int64_t count) {
    buffer_.resize(count * sizeof(S));
    S* to = reinterpret_cast<S*>(buffer_.data());
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<S>(values[i]);
    return buffer_.data();
  }
  const char* in_output_type(const R* values, std::int64_t count) {
    switch (dtype_) {
      case at::kHalf: return converted<at::Half>(values, count);
      case at::kBFloat16: return converted<at::BFloat16>(values, count);
      case at::kFloat: return converted<float>(values, count);
      default: return converted<double>(values, count);
    }
  }
  void copy(char* to, const R* values, std::int64_t count) {
    const char* from = dtype_ == c10::CppTypeToScalarType<R>::value ? reinterpret_cast<const char*>(values)
                                                                   : in_output_type(values, count);
    if (streaming_)
      stream_copy(to, from, std::size_t(count * bytes_));
    else
      std::memcpy(to, from, std::size_t(count * bytes_));
  }

  char* data_;
  at::ScalarType dtype_;
  std::int64_t bytes_;
  const Grid& grid_;
  bool streaming_;
  std::int64_t channel_ = 0, written_ = 0, end_ = 0;
  std::vector<char> buffer_;
};

// Keeps the voxels that are not zero, with their place in the channel.
template <class R>
class SparseSink final : public Sink<R> {
 public:
  explicit SparseSink(const Grid& grid) : grid_(grid) {}
  void rows(std::int64_t plane, int first, int last, const R* values) override {
    const std::int64_t start = (plane * grid_.shape[1] + first) * grid_.shape[2];
    const std::int64_t count = (last - first + 1) * grid_.shape[2];
    for (std::int64_t i = 0; i < count; ++i) {
      if (values[i] == R(0)) continue;
      voxels.push_back(start + i);
      kept.push_back(values[i]);
    }
  }
  std::vector<std::int64_t> voxels;
  std::vector<R> kept;

 private:
  const Grid& grid_;
};

// ---- checks that look at the data

template <class R>
void check_molecules(const Molecules<R>& m) {
  TORCH_CHECK_VALUE(m.ptr[0] == 0 && m.ptr[m.B] == m.N, "ptr must run from 0 to the number of atoms ", m.N,
                    ", it runs from ", m.ptr[0], " to ", m.ptr[m.B]);
  for (std::int64_t b = 0; b < m.B; ++b)
    TORCH_CHECK_VALUE(m.ptr[b] <= m.ptr[b + 1], "ptr must ascend, ptr[", b, "] = ", m.ptr[b], " is followed by ",
                      m.ptr[b + 1]);
  for (std::int64_t n = 0; m.channel != nullptr && n < m.N; ++n)
    TORCH_CHECK_VALUE(m.channel[n] >= 0 && m.channel[n] < m.C, "channels must be in 0..", m.C - 1,
                      " (num_channels = ", m.C, "), atom ", n, " has ", m.channel[n]);
  const std::int64_t numbers = m.N * 3 * (m.posed ? m.K : 1);
  for (std::int64_t i = 0; i < numbers; ++i)
    TORCH_CHECK_VALUE(std::isfinite(m.coords[i]), "coords must be finite, atom ", i / (numbers / m.N), " has ",
                      m.coords[i]);
}

// ---- launch

// The planes of a channel are shared out only when there are too few channels to go round.
std::int64_t slabs_for(std::int64_t volumes, const Grid& grid) {
  const std::int64_t wanted = 4 * at::get_num_threads();
  if (volumes == 0 || volumes >= wanted) return 1;
  return std::max<std::int64_t>(1, std::min(grid.shape[0], (wanted + volumes - 1) / volumes));
}

// Calls f(unit, volume index) for every slab of every channel of every grid, on all threads.
template <class F>
void for_units(std::int64_t volumes, std::int64_t channels, const Grid& grid, std::int64_t slabs, F f) {
  const std::int64_t thick = (grid.shape[0] + slabs - 1) / slabs;
  const std::int64_t grain = std::max<std::int64_t>(1, 32768 / std::max<std::int64_t>(1, grid.voxels() / slabs));
  at::parallel_for(0, volumes * slabs, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t u = begin; u < end; ++u) {
      const std::int64_t volume = u / slabs, first = u % slabs * thick;
      const std::int64_t last = std::min(first + thick, grid.shape[0]) - 1;
      if (first <= last) f(Unit{volume / channels, volume % channels, {int(first), int(last)}}, volume);
    }
  });
}

template <class T>
void forward(const Job<Real<T>>& job, at::Tensor& out) {
  const ForwardKernel<T> kernel = kernels<T>(job.grid.density).forward;
  const std::int64_t volumes = job.m.B * job.m.K * job.m.C;
  // Below this the output may still be in a cache when it is read next, and streaming would push it out.
  constexpr std::int64_t kStreamFrom = std::int64_t(8) << 20;
  const bool streaming = std::int64_t(out.nbytes()) >= kStreamFrom;
  for_units(volumes, job.m.C, job.grid, slabs_for(volumes, job.grid), [&](Unit unit, std::int64_t volume) {
    DenseSink<Real<T>> sink(out, job.grid, streaming);
    sink.begin(volume, unit.planes);
    kernel(job, unit, sink);
    sink.end();
  });
}

template <class T>
void backward(const Job<Real<T>>& job, const at::Tensor& grad, const Gradients<Real<T>>& to) {
  const BackwardKernel<T> kernel = kernels<T>(job.grid.density).backward;
  const GradientRows<Real<T>> rows{grad.const_data_ptr(), grad.scalar_type()};
  const Molecules<Real<T>>& m = job.m;
  constexpr std::int64_t kAtomsPerTask = 8;
  at::parallel_for(0, m.N, kAtomsPerTask, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t b = std::upper_bound(m.ptr, m.ptr + m.B + 1, begin) - m.ptr - 1;
    for (std::int64_t n = begin; n < end; ++n) {
      while (n >= m.ptr[b + 1]) ++b;
      kernel(job, rows, to, b, n);
    }
  });
}

// ---- ops

template <class R>
void voxelize_into(at::Tensor& out, const MoleculeTensors& t, const Grid& grid) {
  const Job<R> job{t.view<R>(), {}, grid};
  check_molecules(job.m);
  forward<R>(job, out);
}

at::Tensor new_grid(const MoleculeTensors& t, const Grid& grid, at::ScalarType dtype) {
  at::Tensor out = at::empty({t.grids(), t.channels(), grid.shape[0], grid.shape[1], grid.shape[2]},
                             t.coords.options().dtype(dtype));
  ask_for_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}

void fill(at::Tensor& out, const MoleculeTensors& t, const Grid& grid) {
  if (t.coords.scalar_type() == at::kDouble)
    voxelize_into<double>(out, t, grid);
  else
    voxelize_into<float>(out, t, grid);
}

at::Tensor voxelize_cpu(FN_MOLECULES, FN_POSE, at::IntArrayRef shape, FN_RULE, at::ScalarType dtype) {
  check_new_grid(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing, density,
                 combine, cutoff, dtype);
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega, center, rotation, translation);
  const Grid grid = make_grid(shape, spacing, density, combine, cutoff);
  at::Tensor out = new_grid(t, grid, dtype);
  fill(out, t, grid);
  return out;
}

void voxelize_into_cpu(at::Tensor& out, FN_MOLECULES, FN_POSE, FN_RULE) {
  check_into(out, coords, ptr, channel, weight, size, omega, center, rotation, translation, spacing, density, combine,
             cutoff);
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega, center, rotation, translation);
  fill(out, t, make_grid(out.sizes().slice(2), spacing, density, combine, cutoff));
}

template <class R>
std::tuple<at::Tensor, at::Tensor> sparse(const MoleculeTensors& t, const Grid& grid) {
  const Job<R> job{t.view<R>(), {}, grid};
  check_molecules(job.m);
  const ForwardKernel<R> kernel = kernels<R>(grid.density).forward;
  const std::int64_t volumes = t.grids() * t.channels(), slabs = slabs_for(volumes, grid);
  const std::int64_t thick = (grid.shape[0] + slabs - 1) / slabs;
  std::vector<SparseSink<R>> parts(volumes * slabs, SparseSink<R>(grid));
  for_units(volumes, t.channels(), grid, slabs, [&](Unit unit, std::int64_t volume) {
    kernel(job, unit, parts[volume * slabs + unit.planes.first / thick]);
  });
  std::int64_t filled = 0;
  for (const SparseSink<R>& part : parts) filled += std::int64_t(part.voxels.size());
  at::Tensor indices = at::empty({5, filled}, t.ptr.options()), values = at::empty({filled}, t.coords.options());
  std::int64_t* index = indices.mutable_data_ptr<int64_t>();
  R* value = values.mutable_data_ptr<R>();
  const std::int64_t height = grid.shape[1], width = grid.shape[2];
  std::int64_t i = 0;
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const std::int64_t volume = std::int64_t(p) / slabs;
    for (std::size_t j = 0; j < parts[p].voxels.size(); ++j, ++i) {
      const std::int64_t voxel = parts[p].voxels[j];
      const std::int64_t at[5] = {volume / t.channels(), volume % t.channels(), voxel / (height * width),
                                  voxel / width % height, voxel % width};
      for (int a = 0; a < 5; ++a) index[a * filled + i] = at[a];
      value[i] = parts[p].kept[j];
    }
  }
  return {indices, values};
}

std::tuple<at::Tensor, at::Tensor> voxelize_sparse_cpu(FN_MOLECULES, FN_POSE, at::IntArrayRef shape, FN_RULE,
                                                       at::ScalarType dtype) {
  check_new_grid(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing, density,
                 combine, cutoff, dtype);
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega, center, rotation, translation);
  const Grid grid = make_grid(shape, spacing, density, combine, cutoff);
  auto [indices, values] =
      t.coords.scalar_type() == at::kDouble ? sparse<double>(t, grid) : sparse<float>(t, grid);
  return {indices, values.to(dtype)};
}

// A gradient that is wanted, or an empty tensor.
at::Tensor new_gradient(bool wanted, at::IntArrayRef sizes, const at::Tensor& like) {
  return wanted ? at::zeros(sizes, like.options()) : at::empty({0}, like.options());
}

template <class R>
R* data_if(bool wanted, at::Tensor& t) {
  return wanted ? t.mutable_data_ptr<R>() : nullptr;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> voxelize_backward_cpu(const at::Tensor& grad, FN_MOLECULES,
                                                                                 FN_RULE,
                                                                                 std::array<bool, 4> wanted) {
  check_backward(grad, coords, ptr, channel, weight, size, omega, spacing, density, combine, cutoff);
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega);
  const at::Tensor g = grad.contiguous();
  const Grid grid = make_grid(g.sizes().slice(2), spacing, density, combine, cutoff);
  at::Tensor to[4] = {new_gradient(wanted[0], coords.sizes(), weight),
                      new_gradient(wanted[1], weight.sizes(), weight), new_gradient(wanted[2], weight.sizes(), weight),
                      new_gradient(wanted[3], weight.sizes(), weight)};
  const auto run = [&]<class R>(R) {
    const Job<R> job{t.view<R>(), {}, grid};
    check_molecules(job.m);
    backward<R>(job, g,
                {data_if<R>(wanted[0], to[0]), data_if<R>(wanted[1], to[1]), data_if<R>(wanted[2], to[2]),
                 data_if<R>(wanted[3], to[3])});
  };
  coords.scalar_type() == at::kDouble ? run(double()) : run(float());
  return {to[0], to[1], to[2], to[3]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> voxelize_double_backward_cpu(
    const OptionalTensor& position_tangent, const OptionalTensor& weight_tangent, const OptionalTensor& size_tangent,
    const OptionalTensor& omega_tangent, const at::Tensor& grad, FN_MOLECULES, FN_RULE) {
  check_backward(grad, coords, ptr, channel, weight, size, omega, spacing, density, combine, cutoff);
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega);
  const OptionalTensor along[4] = {
      MoleculeTensors::contiguous(position_tangent), MoleculeTensors::contiguous(weight_tangent),
      MoleculeTensors::contiguous(size_tangent), MoleculeTensors::contiguous(omega_tangent)};
  const at::Tensor g = grad.contiguous();
  const Grid grid = make_grid(g.sizes().slice(2), spacing, density, combine, cutoff);
  at::Tensor grid_gradient = at::empty(g.sizes(), g.options());
  at::Tensor to[4] = {at::zeros(coords.sizes(), weight.options()), at::zeros(weight.sizes(), weight.options()),
                      at::zeros(weight.sizes(), weight.options()), at::zeros(weight.sizes(), weight.options())};
  const auto run = [&]<class R>(R) {
    const Tangent<R> tangent{data_or_null<R>(along[0]), data_or_null<R>(along[1]), data_or_null<R>(along[2]),
                             data_or_null<R>(along[3])};
    const Job<R> job{t.view<R>(), tangent, grid};
    check_molecules(job.m);
    forward<Dual<R>>(job, grid_gradient);
    backward<Dual<R>>(job, g,
                      {to[0].mutable_data_ptr<R>(), to[1].mutable_data_ptr<R>(), to[2].mutable_data_ptr<R>(),
                       to[3].mutable_data_ptr<R>()});
  };
  coords.scalar_type() == at::kDouble ? run(double()) : run(float());
  return {grid_gradient, to[0], to[1], to[2], to[3]};
}

// ---- sums over the atoms of a molecule, and back

void check_ptr(const int64_t* ptr, int64_t segments, int64_t n) {
  TORCH_CHECK_VALUE(ptr[0] == 0 && ptr[segments] == n && std::is_sorted(ptr, ptr + segments + 1),
                    "ptr must ascend from 0 to ", n);
}

at::Tensor segment_sum_cpu(const at::Tensor& x, const at::Tensor& ptr) {
  check_segments("x", x, ptr);
  const at::Tensor from = x.contiguous();
  const at::Tensor bounds = ptr.contiguous();
  const int64_t* p = bounds.const_data_ptr<int64_t>();
  const int64_t segments = ptr.size(0) - 1, width = x.size(1);
  check_ptr(p, segments, x.size(0));
  at::Tensor out = at::empty({segments, width}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "segment_sum", [&] {
    const scalar_t* data = from.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t j = 0; j < width; ++j) {
        double sum = 0;
        for (int64_t i = p[s]; i < p[s + 1]; ++i) sum += data[i * width + j];
        to[s * width + j] = scalar_t(sum);
      }
  });
  return out;
}

at::Tensor segment_expand_cpu(const at::Tensor& y, const at::Tensor& ptr, int64_t n) {
  check_expansion(y, ptr);
  const at::Tensor from = y.contiguous();
  const at::Tensor bounds = ptr.contiguous();
  const int64_t* p = bounds.const_data_ptr<int64_t>();
  const int64_t segments = ptr.size(0) - 1, width = y.size(1);
  check_ptr(p, segments, n);
  at::Tensor out = at::empty({n, width}, y.options());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "segment_expand", [&] {
    const scalar_t* data = from.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t i = p[s]; i < p[s + 1]; ++i) std::copy_n(data + s * width, width, to + i * width);
  });
  return out;
}

}  // namespace
}  // namespace fastnuggets

TORCH_LIBRARY_IMPL(fastnuggets, CPU, m) {
  m.impl("voxelize", &fastnuggets::voxelize_cpu);
  m.impl("voxelize_", &fastnuggets::voxelize_into_cpu);
  m.impl("voxelize_sparse", &fastnuggets::voxelize_sparse_cpu);
  m.impl("voxelize_backward", &fastnuggets::voxelize_backward_cpu);
  m.impl("voxelize_double_backward", &fastnuggets::voxelize_double_backward_cpu);
  m.impl("segment_sum", &fastnuggets::segment_sum_cpu);
  m.impl("segment_expand", &fastnuggets::segment_expand_cpu);
}

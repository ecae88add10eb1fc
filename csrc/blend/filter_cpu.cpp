// CPU kernel of filters with a few taps. A unit of work is a band of rows of a plane. The rows that are read at a time
// go round in a ring, each copied once with its borders, in the type that is added up; then a tap is a pointer.
#include "blend/filter_cpu.h"

#include "blend/filter_op.h"
#include "common/normal.h"

namespace fastnuggets::filter {
namespace {

constexpr Index kOver = 64;            // numbers that a loop may read past the end of a row
constexpr Index kBandNumbers = 65536;  // of a band: enough rows, that those which two bands copy do not matter

// ---- sums of a row's taps: `row[k]` is where tap k begins

// Stores the first n of four vectors.
template <class R>
FN_BODY void store_lanes(const Vector<R>& s0, const Vector<R>& s1, const Vector<R>& s2, const Vector<R>& s3, Index n,
                         R* out) {
  R last[4 * kLanes<R>];
  R* const to = n < 4 * kLanes<R> ? last : out;
  std::memcpy(to, &s0, sizeof s0);
  std::memcpy(to + kLanes<R>, &s1, sizeof s1);
  std::memcpy(to + 2 * kLanes<R>, &s2, sizeof s2);
  std::memcpy(to + 3 * kLanes<R>, &s3, sizeof s3);
  if (to == last) std::memcpy(out, last, sizeof(R) * std::size_t(n));
}

// One number's worth of a tap: x is weighted, or a product already.
template <bool weighted, class R>
FN_BODY void add_tap(R weight, const R* x, Vector<R>& sum) {
  Vector<R> in;
  load_lanes(x, in);
  if constexpr (weighted)
    sum += weight * in;
  else
    sum += in;
}

template <bool weighted, class R>
FN_BODY void add_taps(const R* const* row, const R* weight, int count, Index n, R* out) {
  for (Index i = 0; i < n; i += 4 * kLanes<R>) {
    Vector<R> s0{}, s1{}, s2{}, s3{};
    for (int k = 0; k < count; ++k) {
      const R* const x = row[k] + i;
      const R w = weighted ? weight[k] : R(1);
      add_tap<weighted>(w, x, s0);
      add_tap<weighted>(w, x + kLanes<R>, s1);
      add_tap<weighted>(w, x + 2 * kLanes<R>, s2);
      add_tap<weighted>(w, x + 3 * kLanes<R>, s3);
    }
    store_lanes<R>(s0, s1, s2, s3, n - i, out + i);
  }
}

// Of products: each addition is rounded; what joins the tap before is added to that first.
FN_BODY void add_parts(const float* const* row, const Taps& taps, Index n, float* out) {
  using V = Vector<float>;
  constexpr int kL = kLanes<float>;
  for (Index i = 0; i < n; i += 4 * kL) {
    V s0{}, s1{}, s2{}, s3{};
    for (int k = 0; k < taps.count;) {
      V p0, p1, p2, p3;
      load_lanes(row[k] + i, p0);
      load_lanes(row[k] + i + kL, p1);
      load_lanes(row[k] + i + 2 * kL, p2);
      load_lanes(row[k] + i + 3 * kL, p3);
      for (++k; k < taps.count && taps.tap[k].joins; ++k) {
        add_tap<false>(1.0f, row[k] + i, p0);
        add_tap<false>(1.0f, row[k] + i + kL, p1);
        add_tap<false>(1.0f, row[k] + i + 2 * kL, p2);
        add_tap<false>(1.0f, row[k] + i + 3 * kL, p3);
      }
      s0 += p0;
      s1 += p1;
      s2 += p2;
      s3 += p3;
    }
    store_lanes<float>(s0, s1, s2, s3, n - i, out + i);
  }
}

// Sums of `count` bytes each, 2 to 15, become their means, to nearest, ties to even. A quotient s / d by multiplication
// with 2^16 / d rounded up is exact for s < 2^16 / d, and s stays below 256 d.
template <bool even>
FN_BODY void divide_sums(const std::uint16_t* sum, int count, Index n, std::uint8_t* out) {
  constexpr int kStep = 32;
  const std::uint16_t half = std::uint16_t(count / 2), divisor = std::uint16_t(count);
  std::uint16_t inverse[kStep];  // one for each: so GCC sees the multiplication that gives the upper half
  std::fill_n(inverse, kStep, std::uint16_t((65536 + count - 1) / count));
  for (Index i = 0; i < n; i += kStep) {
    std::uint8_t last[kStep];
    std::uint8_t* const to = n - i < kStep ? last : out + i;
#pragma omp simd
    for (int j = 0; j < kStep; ++j) {
      const std::uint16_t up = std::uint16_t(sum[i + j] + half);
      const std::uint16_t quotient = std::uint16_t((std::uint32_t(up) * std::uint32_t(inverse[j])) >> 16);
      // Nothing left over: the sum of an even number was half way, and the quotient is the upper one of two.
      const std::uint16_t tie = even && std::uint16_t(quotient * divisor) == up;
      to[j] = std::uint8_t(quotient - (tie & quotient));
    }
    if (to == last) std::memcpy(out + i, last, std::size_t(n - i));
  }
}

// ---- bands

// How the sum of a row is made: of bytes that all weigh 1 and whose number is the divisor, in 16 bits; of other bytes,
// in float32, which is exact as well; of rounded products; of floating numbers.
enum class Sum { bytes, exact_quotient, products, plain };

// S is what is stored, T what the copied rows hold.
template <class S, class T, Sum sum>
struct Band {
  const FilterTaps& how;
  Index band_rows, bands;

  // The rows around the one that is made; row y of the plane, from -radius on.
  struct Ring {
    Index radius, stride;
    std::vector<T> memory;
    FN_BODY T* row(Index y) { return memory.data() + (y + radius) % (2 * radius + 1) * stride; }
    FN_BODY const T* row(Index y) const { return memory.data() + (y + radius) % (2 * radius + 1) * stride; }
  };

  // Of a copied row, in numbers.
  FN_BODY Index pad() const { return how.taps.radius_x * (how.transposed ? 2 : 1) * how.shape.I; }
  FN_BODY Index stride() const { return (how.shape.row() + 2 * pad() + 2 * kOver) / kOver * kOver; }

  // What is added up of a number.
  FN_BODY void copied(const S* from, Index n, T* to) const {
    load_row(from, n, to);
    if constexpr (sum == Sum::products) {
      const float weight = product_weight();
#pragma omp simd
      for (Index i = 0; i < n; ++i) to[i] = exact::mul(weight, to[i]);
    }
  }
  FN_BODY float product_weight() const { return float(how.taps.tap[0].weight) / float(how.taps.divisor); }
  FN_BODY T outside() const {
    if constexpr (sum == Sum::products) return exact::mul(product_weight(), float(how.value));
    return T(how.transposed ? 0 : how.value);
  }

  // Row y of a plane, anywhere, with its borders; before, after: the columns that are found left and right of it.
  FN_BODY void copy_row(const S* plane, Index y, const Index* before, const Index* after, T* to) const {
    const Layout& s = how.shape;
    const Index row = s.row();
    const bool zeros = how.transposed || how.border == Border::constant;
    if (zeros && (y < 0 || y >= s.H)) {
      std::fill_n(to, row + 2 * pad(), outside());
      return;
    }
    T* const begin = to + pad();
    copied(plane + inside(how.border, y, s.H) * row, row, begin);
    if (zeros) {
      std::fill_n(to, pad(), outside());
      std::fill_n(begin + row, pad(), outside());
      return;
    }
    for (Index x = 0; x < how.taps.radius_x; ++x)
      for (Index c = 0; c < s.I; ++c) {
        begin[-(x + 1) * s.I + c] = begin[before[x] * s.I + c];
        begin[row + x * s.I + c] = begin[after[x] * s.I + c];
      }
  }

  FN_BODY void forward_row(const T* const* row, const T* weight, S* out, T* made) const {
    const Index n = how.shape.row();
    const int count = how.taps.count;
    if constexpr (sum == Sum::bytes) {
      add_taps<false>(row, weight, count, n, made);
      if (count % 2 == 0)
        divide_sums<true>(made, count, n, out);
      else
        divide_sums<false>(made, count, n, out);
    } else if constexpr (sum == Sum::products) {
      add_parts(row, how.taps, n, made);
#pragma omp simd
      for (Index i = 0; i < n; ++i) {
        const float in = made[i] < 0.0f ? 0.0f : made[i] > 255.0f ? 255.0f : made[i];
        out[i] = std::uint8_t(std::int32_t(in));
      }
    } else if constexpr (sum == Sum::exact_quotient) {
      add_taps<true>(row, weight, count, n, made);
      const float divisor = float(how.taps.divisor);
#pragma omp simd
      for (Index i = 0; i < n; ++i) out[i] = to_byte(made[i] / divisor);
    } else if constexpr (std::is_same_v<S, T>) {
      add_taps<true>(row, weight, count, n, out);
    } else {
      add_taps<true>(row, weight, count, n, made);
      store_row(made, n, out);
    }
  }

  // The gradient of row y: every place of which it is the image, outside as well as inside, rows then columns.
  FN_BODY void transposed_row(const Ring& ring, Index y, const T* weight, S* out, T* made, std::vector<const T*>& row,
                              std::vector<T>& weights) const {
    const Layout& s = how.shape;
    const Taps& taps = how.taps;
    const Index ry = taps.radius_y, rx = taps.radius_x, n = s.row() + 2 * rx * s.I;
    row.clear();
    weights.clear();
    const auto add_from = [&](Index e) __attribute__((always_inline)) {
      for (int k = 0; k < taps.count; ++k) {
        const Index from = e - taps.tap[k].dy;
        if (from < 0 || from >= s.H) continue;
        row.push_back(ring.row(from) + (rx - taps.tap[k].dx) * s.I);
        weights.push_back(weight[k]);
      }
    };
    add_from(y);
    if (how.border != Border::constant)
      for (Index e = next_image(how.border, y, s.H, ry, -ry - 1); e < s.H + ry;
           e = next_image(how.border, y, s.H, ry, e))
        add_from(e);
    add_taps<true>(static_cast<const T* const*>(row.data()), static_cast<const T*>(weights.data()), int(row.size()), n,
                   made);
    T* const begin = made + rx * s.I;
    if (how.border != Border::constant)
      for (Index x = 1; x <= rx; ++x)
        for (Index c = 0; c < s.I; ++c) {
          begin[inside(how.border, -x, s.W) * s.I + c] += begin[-x * s.I + c];
          begin[inside(how.border, s.W - 1 + x, s.W) * s.I + c] += begin[(s.W - 1 + x) * s.I + c];
        }
    store_row(begin, s.row(), out);
  }

  template <Simd>
  FN_BODY void run(Index from, Index to) const {
    const Layout& s = how.shape;
    const Taps& taps = how.taps;
    const Index ry = taps.radius_y;
    Ring ring{ry, stride(), {}};
    ring.memory.resize(std::size_t(stride() * (2 * ry + 1) + kOver));
    std::vector<T> made, weights;
    made.resize(std::size_t(stride()));
    std::vector<const T*> all;
    std::vector<Index> before, after;
    for (Index x = 0; x < taps.radius_x; ++x) {
      before.push_back(inside(how.border, -1 - x, s.W));
      after.push_back(inside(how.border, s.W + x, s.W));
    }
    const T* row[kMostTaps];
    T weight[kMostTaps];
    const T divisor = sum == Sum::plain ? T(taps.divisor) : T(1);
    for (int k = 0; k < taps.count; ++k) weight[k] = T(taps.tap[k].weight) / divisor;
    for (Index unit = from; unit < to; ++unit) {
      const Index first = unit % bands * band_rows, last = std::min(first + band_rows, s.H);
      const S* const plane = static_cast<const S*>(how.image) + unit / bands * s.plane();
      S* const out = static_cast<S*>(how.out) + unit / bands * s.plane();
      for (Index y = first - ry; y < first + ry; ++y) copy_row(plane, y, before.data(), after.data(), ring.row(y));
      for (Index y = first; y < last; ++y) {
        copy_row(plane, y + ry, before.data(), after.data(), ring.row(y + ry));
        if constexpr (std::is_floating_point_v<T> && !std::is_integral_v<S>) {
          if (how.transposed) {
            transposed_row(ring, y, weight, out + y * s.row(), made.data(), all, weights);
            continue;
          }
        }
        for (int k = 0; k < taps.count; ++k)
          row[k] = ring.row(y + taps.tap[k].dy) + (taps.radius_x + taps.tap[k].dx) * s.I;
        forward_row(row, weight, out + y * s.row(), made.data());
      }
    }
  }
};

template <class S, class T, Sum sum>
void run_bands(const FilterTaps& how) {
  const Layout& s = how.shape;
  const Index rows = std::clamp<Index>(kBandNumbers / std::max<Index>(1, s.row()), 8, std::max<Index>(8, s.H));
  const Index bands = (s.H + rows - 1) / rows;
  share_out(Band<S, T, sum>{how, rows, bands}, s.B * s.P * bands, rows * s.row());
}

bool sums_bytes(const FilterTaps& how) {
  const Taps& t = how.taps;
  return how.rounding == Rounding::nearest && t.divisor == t.count && t.count > 1 && t.count < 16 &&
         std::all_of(t.tap, t.tap + t.count, [](const Tap& tap) { return tap.weight == 1; });
}

void taps_cpu(const FilterTaps& how) {
  switch (how.dtype) {
    case Dtype::uint8:
      if (sums_bytes(how)) return run_bands<std::uint8_t, std::uint16_t, Sum::bytes>(how);
      if (how.rounding == Rounding::truncate) return run_bands<std::uint8_t, float, Sum::products>(how);
      return run_bands<std::uint8_t, float, Sum::exact_quotient>(how);
    case Dtype::float64:
      return run_bands<double, double, Sum::plain>(how);
    case Dtype::float16:
      return run_bands<Half, float, Sum::plain>(how);
    case Dtype::bfloat16:
      return run_bands<BFloat16, float, Sum::plain>(how);
    default:
      return run_bands<float, float, Sum::plain>(how);
  }
}

const Kernels kCpu{&taps_cpu, &pyramid_step_cpu, &multiband_cpu, &multiband_backward_cpu};
const Register kRegistered(at::kCPU, kCpu);

}  // namespace
}  // namespace fastnuggets::filter

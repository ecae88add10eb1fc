// CPU kernels. Threads share out bands of rows; in a band one object is drawn after the other, while it is in the
// cache. No pixel depends on where a band ends, so neither do the bits. In the backward pass each object is one
// thread's.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "blend/composite_math.h"
#include "blend/composite_op.h"
#include "common/cpu.h"

#define FN_BODY inline __attribute__((always_inline))

namespace fastnuggets::composite {
namespace {

// ---- rows: functors whose loops are compiled for each instruction set

struct Plain {
  template <class F, class... Args>
  __attribute__((noinline)) static auto run(F f, Args... args) {
    return f(args...);
  }
};
struct Avx2 {
  template <class F, class... Args>
  FN_TARGET_AVX2 __attribute__((noinline)) static auto run(F f, Args... args) {
    return f(args...);
  }
};
struct Avx512 {
  template <class F, class... Args>
  FN_TARGET_AVX512 __attribute__((noinline)) static auto run(F f, Args... args) {
    return f(args...);
  }
};

template <class F, class... Args>
auto vectorised(F f, Args... args) {
  switch (simd()) {
    case Simd::avx512:
      return Avx512::run(f, args...);
    case Simd::avx2:
      return Avx2::run(f, args...);
    default:
      return Plain::run(f, args...);
  }
}

using Byte = std::uint8_t;
using Fixed = std::uint16_t;  // a mask's share, 1 is kFixedOne; a tap, 1 is 2^16

constexpr Fixed kFixedOne = 255 << 7;  // twice it fits, for a pair of mirrored taps
constexpr int kAlphaBits = 14;         // of what a feather's last pass makes of it
constexpr int kMaxFixedRadius = 15;    // each tap loses up to a unit

// a f + (255 - a) u over 255, to nearest: there are no ties.
FN_HD Byte over(Byte f, Byte a, Byte u) {
  const Fixed t = Fixed(a * f + (255 - a) * u + 128), s = Fixed(t + (t >> 8));
  return Byte(s >> 8);
}

template <Mix mix>
FN_HD Byte top(Byte f, Byte u) {
  if constexpr (mix == Mix::over) return f;
  return Byte(f > u ? f - u : u - f);
}

template <Mix mix>
struct MixBytes {
  FN_BODY void operator()(const Byte* f, const Byte* a, const Byte* u, Byte* out, Index n) const {
#pragma omp simd
    for (Index i = 0; i < n; ++i) out[i] = over(top<mix>(f[i], u[i]), a[i], u[i]);
  }
};

FN_HD Byte over(Byte f, Fixed alpha, Byte u) {
  return Byte(u + ((((2 * (f - u) * int(alpha)) >> kAlphaBits) + 1) >> 1));
}
struct MixFixed {
  FN_BODY void operator()(const Byte* f, const Fixed* alpha, const Byte* u, Byte* out, Index n) const {
#pragma omp simd
    for (Index i = 0; i < n; ++i) out[i] = over(f[i], alpha[i], u[i]);
  }
};

// A value for each channel of each of n pixels.
template <class T>
struct Repeat {
  FN_BODY void operator()(const T* from, T* to, Index n, Index times) const {
    if (times == 3)
      for (Index i = 0; i < n; ++i) to[3 * i] = to[3 * i + 1] = to[3 * i + 2] = from[i];
    else
      for (Index i = 0; i < n; ++i) std::fill_n(to + i * times, times, from[i]);
  }
};

// Where GCC finds twice the instructions that are needed. Each does the first so many of n, and says how many.
#if defined(__x86_64__)
FN_TARGET_AVX2 FN_BODY __m256i bytes_at(const Byte* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

// a f + (255 - a) u, with signed colours: their sum of products fits 16 bits.
template <Mix mix>
FN_TARGET_AVX2 Index mix_avx2(const Byte* f, const Byte* a, const Byte* u, Byte* out, Index n) {
  const __m256i ones = _mm256_set1_epi8(-1), sign = _mm256_set1_epi8(-128);
  const __m256i shift = _mm256_set1_epi16(short(128 * 255 + 127)), inverse = _mm256_set1_epi16(short(0x8081));
  constexpr Index kStep = 32;
  Index i = 0;
  for (; i + kStep <= n; i += kStep) {
    const __m256i under = bytes_at(u + i), share = bytes_at(a + i), rest = _mm256_xor_si256(share, ones);
    __m256i over = bytes_at(f + i);
    if (mix == Mix::difference) over = _mm256_or_si256(_mm256_subs_epu8(over, under), _mm256_subs_epu8(under, over));
    const __m256i x = _mm256_xor_si256(over, sign), y = _mm256_xor_si256(under, sign);
    const __m256i low = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(share, rest), _mm256_unpacklo_epi8(x, y));
    const __m256i high = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(share, rest), _mm256_unpackhi_epi8(x, y));
    // (t + 127) / 255, by a multiplication that is right for all of 16 bits.
    const __m256i l = _mm256_srli_epi16(_mm256_mulhi_epu16(_mm256_add_epi16(low, shift), inverse), 7);
    const __m256i h = _mm256_srli_epi16(_mm256_mulhi_epu16(_mm256_add_epi16(high, shift), inverse), 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_packus_epi16(l, h));
  }
  return i;
}

FN_TARGET_AVX2 FN_BODY __m256i wide_at(const Byte* at) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
FN_TARGET_AVX2 FN_BODY __m256i mixed_at(const Byte* f, const Fixed* alpha, const Byte* u) {
  const __m256i under = wide_at(u), step = _mm256_sub_epi16(wide_at(f), under);
  const __m256i share = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(alpha));
  return _mm256_add_epi16(under, _mm256_mulhrs_epi16(_mm256_add_epi16(step, step), share));
}
FN_TARGET_AVX2 inline Index mix_avx2(const Byte* f, const Fixed* alpha, const Byte* u, Byte* out, Index n) {
  constexpr Index kStep = 32, kHalf = 16;
  Index i = 0;
  for (; i + kStep <= n; i += kStep) {
    const __m256i low = mixed_at(f + i, alpha + i, u + i);
    const __m256i high = mixed_at(f + i + kHalf, alpha + i + kHalf, u + i + kHalf);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), both);
  }
  return i;
}

// Each of 16 bytes' worth of values three times.
template <class T>
FN_TARGET_AVX2 Index repeat3_avx2(const T* from, T* to, Index n) {
  constexpr Index kStep = 16 / Index(sizeof(T));
  __m128i order[3];
  for (int part = 0; part < 3; ++part) {
    alignas(16) Byte places[16];
    for (int k = 0; k < 16; ++k) {
      const int value = (16 * part + k) / int(sizeof(T)) / 3;
      places[k] = Byte(value * int(sizeof(T)) + k % int(sizeof(T)));
    }
    order[part] = _mm_load_si128(reinterpret_cast<const __m128i*>(places));
  }
  Index i = 0;
  for (; i + kStep <= n; i += kStep) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    for (int part = 0; part < 3; ++part)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 3 * i) + part, _mm_shuffle_epi8(values, order[part]));
  }
  return i;
}
#else
template <Mix mix>
Index mix_avx2(const Byte*, const Byte*, const Byte*, Byte*, Index) {
  return 0;
}
inline Index mix_avx2(const Byte*, const Fixed*, const Byte*, Byte*, Index) { return 0; }
template <class T>
Index repeat3_avx2(const T*, T*, Index) {
  return 0;
}
#endif

template <Mix mix>
void mix_bytes(const Byte* f, const Byte* a, const Byte* u, Byte* out, Index n) {
  const Index i = simd() == Simd::generic ? 0 : mix_avx2<mix>(f, a, u, out, n);
  MixBytes<mix>()(f + i, a + i, u + i, out + i, n - i);
}
void mix_fixed(const Byte* f, const Fixed* alpha, const Byte* u, Byte* out, Index n) {
  const Index i = simd() == Simd::generic ? 0 : mix_avx2(f, alpha, u, out, n);
  MixFixed()(f + i, alpha + i, u + i, out + i, n - i);
}
template <class T>
void repeat(const T* from, T* to, Index n, Index times) {
  Index i = 0;
  if constexpr (sizeof(T) < 4)
    if (times == 3 && simd() != Simd::generic) i = repeat3_avx2(from, to, n);
  vectorised(Repeat<T>(), from + i, to + i * times, n - i, times);
}

// A run of a mask that is all nothing, all there, or some of each.
struct Run {
  enum Kind { none, some, all };
  Index from, end;
  Kind kind;
};

// Most of a cut-out is all there or not there.
void find_runs(const Byte* mask, Index n, std::vector<Run>& runs) {
  constexpr Index kBlock = 32;
  runs.clear();
  for (Index i = 0; i < n; i += kBlock) {
    const Index end = std::min(n, i + kBlock);
    std::uint64_t any = 0, all = ~std::uint64_t(0);
    if (end - i == kBlock) {
      for (Index j = i; j < end; j += 8) {
        std::uint64_t word;
        std::memcpy(&word, mask + j, 8);
        any |= word, all &= word;
      }
    } else {
      any = 1;
    }
    const Run::Kind kind = any == 0 ? Run::none : all == ~std::uint64_t(0) && end - i == kBlock ? Run::all : Run::some;
    if (!runs.empty() && runs.back().kind == kind)
      runs.back().end = end;
    else
      runs.push_back({i, end, kind});
  }
}

template <class S, Mix mix>
struct MixRow {
  FN_BODY void operator()(const Real<S>* f, const Real<S>* a, const S* u, S* out, Index n) const {
#pragma omp simd
    for (Index i = 0; i < n; ++i) out[i] = stored<S>(mixed<mix, Real<S>>(f[i], a[i], load(u[i])));
  }
};

// From the derivative by the result; that by u may replace it. `by_alpha` is for each value, of all channels.
template <class R, Mix mix>
struct SlopeRow {
  FN_BODY void operator()(const R* g, const R* f, const R* a, const R* u, R* by_f, R* by_alpha, bool add, R* by_u,
                          Index n) const {
    if (add)
      each<true>(g, f, a, u, by_f, by_alpha, by_u, n);
    else
      each<false>(g, f, a, u, by_f, by_alpha, by_u, n);
  }
  template <bool add>
  FN_BODY static void each(const R* g, const R* f, const R* a, const R* u, R* by_f, R* by_alpha, R* by_u, Index n) {
#pragma omp simd
    for (Index i = 0; i < n; ++i) {
      const Slopes<R> s = slopes<mix, R>(f[i], a[i], u[i]);
      const R given = g[i];
      by_f[i] = given * s.f;
      by_alpha[i] = given * s.a + (add ? by_alpha[i] : R(0));
      by_u[i] = given * s.u;
    }
  }
};

template <class S>
struct Widen {
  FN_BODY void operator()(const S* from, Real<S>* to, Index n) const {
#pragma omp simd
    for (Index i = 0; i < n; ++i) to[i] = load(from[i]);
  }
};
template <class S>
struct Shares {
  FN_BODY void operator()(const S* from, Real<S>* to, Index n) const {
#pragma omp simd
    for (Index i = 0; i < n; ++i) to[i] = share_of(from[i]);
  }
};
struct FixedShares {
  FN_BODY void operator()(const Byte* from, Fixed* to, Index n) const {
#pragma omp simd
    for (Index i = 0; i < n; ++i) to[i] = Fixed(from[i] << 7);
  }
};
template <class S>
struct Narrow {
  FN_BODY void operator()(const Real<S>* from, S* to, Index n) const {
#pragma omp simd
    for (Index i = 0; i < n; ++i) to[i] = stored<S>(from[i]);
  }
};

template <class R>
struct SumRepeated {
  FN_BODY void operator()(const R* from, R* to, Index n, Index times) const {
    for (Index i = 0; i < n; ++i) {
      R sum = 0;
      for (Index c = 0; c < times; ++c) sum += from[i * times + c];
      to[i] = sum;
    }
  }
};

template <class T>
struct Label {
  FN_BODY Index operator()(const T* mask, T half, std::int32_t id, std::int32_t* ids, Index n) const {
    std::int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (Index i = 0; i < n; ++i) {
      const bool is_in = mask[i] >= half;
      ids[i] = is_in ? id : ids[i];
      count += is_in;
    }
    return count;
  }
};

// ---- feathers: weighted sums of neighbours, along a row and down a column

FN_HD Fixed times(Fixed a, Fixed tap) { return Fixed((std::uint32_t(a) * tap) >> 16); }
template <class R>
FN_HD R times(R a, R tap) {
  return a * tap;
}

// rows [2 radius + 1]: along a row these are one row, each shifted by a pixel.
template <class T>
struct Weigh {
  template <int radius>
  FN_BODY void fixed_radius(const T* const* rows, const T* taps, T* out, Index n) const {
    const T* row[2 * radius + 1];
    for (int k = 0; k <= 2 * radius; ++k) row[k] = rows[k];
#pragma omp simd
    for (Index i = 0; i < n; ++i) {
      T sum = times(row[radius][i], taps[0]);
#pragma GCC unroll 4
      for (int k = 1; k <= radius; ++k) sum = T(sum + times(T(row[radius - k][i] + row[radius + k][i]), taps[k]));
      out[i] = sum;
    }
  }
  FN_BODY void operator()(const T* const* rows, const T* taps, int radius, T* out, Index n) const {
    if (radius == 1) return fixed_radius<1>(rows, taps, out, n);
    if (radius == 2) return fixed_radius<2>(rows, taps, out, n);
#pragma omp simd
    for (Index i = 0; i < n; ++i) out[i] = times(rows[radius][i], taps[0]);
    for (int k = 1; k <= radius; ++k) {
      const T *before = rows[radius - k], *after = rows[radius + k];
#pragma omp simd
      for (Index i = 0; i < n; ++i) out[i] = T(out[i] + times(T(before[i] + after[i]), taps[k]));
    }
  }
};
// The last pass in fixed point makes alpha of kAlphaBits.
template <class T>
std::vector<T> taps_of(const Feather& feather, bool last) {
  const double one = last ? 65536.0 * (1 << kAlphaBits) / kFixedOne : 65536.0;
  std::vector<T> taps(std::size_t(feather.radius) + 1);
  for (std::size_t k = 0; k < taps.size(); ++k)
    taps[k] = std::is_same_v<T, Fixed> ? T(std::min(feather.taps[k] * one + 0.5, 65535.0)) : T(feather.taps[k]);
  return taps;
}

// Weighs a row with its neighbours; `padded` has `radius` more at each end of n.
template <class T>
void weigh_along(const T* padded, const std::vector<T>& taps, T* out, Index n) {
  const int radius = int(taps.size()) - 1;
  const T* rows[2 * kMaxRadius + 1];
  for (int k = 0; k <= 2 * radius; ++k) rows[k] = padded + k;
  vectorised(Weigh<T>(), static_cast<const T* const*>(rows), taps.data(), radius, out, n);
}

// The blurred mask of an object, row after row of what is seen of it. Source gives the mask's values:
// source(y, x, n, to), rows and columns of the image inside the box.
template <class T, class Source>
class Blurred {
 public:
  Blurred(const Composite& how, const Placed& o, Source source)
      : source_(source),
        o_(o),
        radius_(how.feather.radius),
        zero_(how.feather.zero_edge),
        along_(taps_of<T>(how.feather, false)),
        down_(taps_of<T>(how.feather, true)),
        width_(o.seen.width()),
        padded_(std::size_t(width_ + 2 * radius_)),
        ring_(std::size_t((2 * radius_ + 2) * width_)) {}  // the last row stays 0

  // Rows are asked for in ascending order.
  void row(Index y, T* out) {
    const Index j = y - o_.box.y0, height = o_.box.height();
    if (next_ < 0) next_ = std::max<Index>(0, j - radius_);
    for (; next_ <= std::min(height - 1, j + radius_); ++next_) along(next_);
    const T* rows[2 * kMaxRadius + 1];
    for (Index k = 0; k <= 2 * radius_; ++k) {
      const Index at = j - radius_ + k;
      const bool is_in = at >= 0 && at < height;
      rows[k] = is_in || !zero_ ? slot(mirrored(at, height)) : ring_.data() + (2 * radius_ + 1) * width_;
    }
    vectorised(Weigh<T>(), static_cast<const T* const*>(rows), static_cast<const T*>(down_.data()), int(radius_), out,
               width_);
  }

 private:
  Source source_;
  const Placed& o_;
  Index radius_;
  bool zero_;
  std::vector<T> along_, down_;
  Index width_;
  std::vector<T> padded_, ring_;
  Index next_ = -1;

  T* slot(Index row) { return ring_.data() + row % (2 * radius_ + 1) * width_; }

  void along(Index row) {
    const Index start = o_.seen.x0 - o_.box.x0 - radius_, end = start + width_ + 2 * radius_, n = o_.box.width();
    const Index from = std::max<Index>(0, start), to = std::min(n, end);
    T* const padded = padded_.data() - start;
    source_(o_.box.y0 + row, o_.box.x0 + from, to - from, padded + from);
    for (Index i = start; i < from; ++i) padded[i] = zero_ ? T(0) : padded[mirrored(i, n)];
    for (Index i = to; i < end; ++i) padded[i] = zero_ ? T(0) : padded[mirrored(i, n)];
    weigh_along(static_cast<const T*>(padded_.data()), along_, slot(row), width_);
  }
};

// ---- where things are

// Channels that come first are planes of one value a pixel; last, one plane of C values a pixel.
struct Layout {
  Index planes, step;

  explicit Layout(const Composite& how) : planes(how.channels_last ? 1 : how.C), step(how.channels_last ? how.C : 1) {}

  Index image(const Composite& how, Index b, Index plane, Index y, Index x) const {
    return (((b * planes + plane) * how.H + y) * how.W + x) * step;
  }
  // The pixel in row i and column j of an object; `channels` is C.
  Index object(const Placed& o, Index channels, Index plane, Index i, Index j) const {
    return o.first * channels + (plane * o.h * o.w + i * o.w + j) * step;
  }
};

// The object's pixels are the image's, one for one, wherever it is drawn.
bool is_copied(const Composite& how) {
  return how.sampling == Sampling::shift && !(how.feather.radius > 0 && how.feather.zero_edge);
}

template <class S>
const S* at(const void* data, Index i) {
  return static_cast<const S*>(data) + i;
}
template <class S>
S* at(void* data, Index i) {
  return static_cast<S*>(data) + i;
}

// ---- reading objects

// What pixels of a row of the image read of an object, as in composite_math.h: the rows and columns of four pixels, and
// what these count for the mask, and for colours that go on beyond the edge.
template <class R>
struct Spots {
  std::int32_t *y[2], *x[2];
  R *mask_y[2], *mask_x[2], *colour_y[2], *colour_x[2];
};

// Places within an axis of n pixels or just outside; behind the horizon, kBehind.
constexpr double kBehind = -3, kOutside = -2;

struct Locate {
  FN_BODY void operator()(const Placed* o, Index row, Index column, double* to_y, double* to_x, Index n) const {
    const double* const m = o->inverse;
    const double y = double(row), by_x = m[1] * y + m[2], by_y = m[4] * y + m[5], by_depth = m[7] * y + m[8];
    const double m0 = m[0], m3 = m[3], m6 = m[6], end_y = double(o->h) + 1, end_x = double(o->w) + 1;
    const auto first = std::int32_t(column);
#pragma omp simd
    for (std::int32_t k = 0; k < std::int32_t(n); ++k) {
      const double x = double(first + k), depth = m6 * x + by_depth, scale = 1 / depth;
      double at_y = (m3 * x + by_y) * scale, at_x = (m0 * x + by_x) * scale;
      at_y = at_y > kOutside ? at_y : kOutside;  // a NaN too
      at_x = at_x > kOutside ? at_x : kOutside;
      at_y = at_y < end_y ? at_y : end_y;
      at_x = at_x < end_x ? at_x : end_x;
      to_y[k] = depth > 0 ? at_y : kBehind;
      to_x[k] = depth > 0 ? at_x : kBehind;
    }
  }
};

// One axis of `count` pixels.
template <class R, bool nearest>
struct Share {
  FN_BODY void operator()(const double* at, Index count, std::int32_t* low, std::int32_t* high, R* mask_low,
                          R* mask_high, R* colour_low, R* colour_high, Index n) const {
    const auto last = std::int32_t(count) - 1;
    const auto size = std::uint32_t(count);
#pragma omp simd
    for (Index k = 0; k < n; ++k) {
      const double base = std::floor(nearest ? at[k] + 0.5 : at[k]);
      const auto first = std::int32_t(base), second = nearest ? first : first + 1;
      const R part = nearest ? R(0) : R(at[k] - base), rest = R(1) - part;
      const R ahead = at[k] > (kBehind + kOutside) / 2 ? R(1) : R(0);
      const std::int32_t low_in = std::min(std::max(first, 0), last), high_in = std::min(std::max(second, 0), last);
      low[k] = low_in;
      high[k] = high_in;
      // Asked so that it is no case of the clamp above: of cases GCC makes masked stores, slow on AMD's processors.
      mask_low[k] = rest * R(std::int32_t(std::uint32_t(first) < size));
      mask_high[k] = part * R(std::int32_t(std::uint32_t(second) < size));
      colour_low[k] = rest * ahead;
      colour_high[k] = part * ahead;
    }
  }
};

// What counts nothing may be a NaN.
template <class R, class V>
FN_BODY R counted(R share, V value) {
  if constexpr (std::is_same_v<V, Byte>) return share * R(load(value));
  return share != 0 ? share * R(load(value)) : R(0);
}

template <class S>
struct GatherMask {
  using R = Real<S>;
  FN_BODY void operator()(const S* mask, Index w, Spots<R> at, R* to, Index n) const {
    const R opaque = std::is_same_v<S, Byte> ? R(255) : R(1);
    for (Index k = 0; k < n; ++k) {
      const R low = at.mask_y[0][k], high = at.mask_y[1][k], left = at.mask_x[0][k], right = at.mask_x[1][k];
      const S *const above = mask + at.y[0][k] * w, *const below = mask + at.y[1][k] * w;
      const std::int32_t i = at.x[0][k], j = at.x[1][k];
      if constexpr (std::is_same_v<S, Byte>) {
        if ((above[i] | above[j] | below[i] | below[j]) == 0) {  // much of a cut-out
          to[k] = 0;
          continue;
        }
      }
      to[k] = (counted(low * left, above[i]) + counted(low * right, above[j]) + counted(high * left, below[i]) +
               counted(high * right, below[j])) /
              opaque;
    }
  }
};

// One plane, of `step` values a pixel.
template <class S>
struct GatherColours {
  using R = Real<S>;
  FN_BODY void operator()(const S* pixels, Index w, Index step, Spots<R> at, R* to, Index n) const {
    for (Index k = 0; k < n; ++k) {
      const R low = at.colour_y[0][k], high = at.colour_y[1][k], left = at.colour_x[0][k], right = at.colour_x[1][k];
      const S *const above = pixels + at.y[0][k] * w * step, *const below = pixels + at.y[1][k] * w * step;
      const Index i = at.x[0][k] * step, j = at.x[1][k] * step;
      for (Index s = 0; s < step; ++s)
        to[k * step + s] = counted(low * left, above[i + s]) + counted(low * right, above[j + s]) +
                           counted(high * left, below[i + s]) + counted(high * right, below[j + s]);
    }
  }
};

// Three bytes a pixel, read four at a time: `last` pixels from the first there must be one more.
#if defined(__x86_64__)
FN_TARGET_AVX2 FN_BODY __m128 three_at(const Byte* at) {
  std::int32_t word;
  std::memcpy(&word, at, sizeof word);
  return _mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(word)));
}
// `to` has room for one value more.
FN_TARGET_AVX2 inline void gather3_avx2(const Byte* pixels, Index w, Spots<float> at, float* to, Index n) {
  for (Index k = 0; k < n; ++k) {
    const float low = at.colour_y[0][k], high = at.colour_y[1][k], left = at.colour_x[0][k], right = at.colour_x[1][k];
    const Byte *const above = pixels + at.y[0][k] * w * 3, *const below = pixels + at.y[1][k] * w * 3;
    const Index i = at.x[0][k] * 3, j = at.x[1][k] * 3;
    __m128 sum = _mm_mul_ps(_mm_set1_ps(low * left), three_at(above + i));
    sum = _mm_fmadd_ps(_mm_set1_ps(low * right), three_at(above + j), sum);
    sum = _mm_fmadd_ps(_mm_set1_ps(high * left), three_at(below + i), sum);
    _mm_storeu_ps(to + 3 * k, _mm_fmadd_ps(_mm_set1_ps(high * right), three_at(below + j), sum));
  }
}
#endif

// Rows of an object as they lie on the image: n pixels from (y, x) on.
template <class S>
class Reader {
 public:
  using R = Real<S>;

  Reader(const Composite& how, const Placed& o) : how_(how), o_(o), layout_(how) {}

  void mask(Index y, Index x, Index n, R* to) {
    const S* const mask = at<S>(how_.mask, o_.first);
    if (how_.sampling == Sampling::shift) {
      const Index i = y - o_.top, from = std::clamp<Index>(o_.left - x, 0, n);
      const bool is_in = i >= 0 && i < o_.h;
      const Index end = is_in ? std::clamp<Index>(o_.left + o_.w - x, from, n) : from;
      std::fill(to, to + from, R(0));
      const S* const row = mask + i * o_.w + x - o_.left;
      if constexpr (std::is_same_v<S, R>)
        std::copy(row + from, row + end, to + from);
      else if (end > from)
        vectorised(Shares<S>(), row + from, to + from, end - from);
      std::fill(to + end, to + n, R(0));
      return;
    }
    vectorised(GatherMask<S>(), mask, o_.w, spots(y, x, n), to, n);
  }

  // to [planes, n * step] and room for one value more. Where `alpha` is given and 0 they may stay what they are.
  void colours(Index y, Index x, Index n, const R* alpha, R* to) {
    const S* const pixels = at<S>(how_.pixels, o_.first * how_.C);
    const Index step = layout_.step, plane = o_.h * o_.w;
    if (is_copied(how_)) {
      for (Index p = 0; p < layout_.planes; ++p)
        vectorised(Widen<S>(), pixels + (p * plane + (y - o_.top) * o_.w + x - o_.left) * step, to + p * n * step,
                   n * step);
      return;
    }
    Index from = 0, end = n;
    if (alpha != nullptr) {
      while (from < end && alpha[from] == 0) ++from;
      while (from < end && alpha[end - 1] == 0) --end;
    }
    Spots<R> at = shifted(spots(y, x, n), from);
    if (!colour_clamped(how_)) {
      std::copy_n(at.mask_y, 2, at.colour_y);
      std::copy_n(at.mask_x, 2, at.colour_x);
    }
#if defined(__x86_64__)
    if constexpr (std::is_same_v<S, Byte>)
      if (step == 3 && simd() != Simd::generic && o_.first + plane < how_.P)
        return gather3_avx2(pixels, o_.w, at, to + from * step, end - from);
#endif
    for (Index p = 0; p < layout_.planes; ++p)
      vectorised(GatherColours<S>(), pixels + p * plane, o_.w, step, at, to + (p * n + from) * step, end - from);
  }

 private:
  const Composite& how_;
  const Placed& o_;
  Layout layout_;
  std::vector<double> at_;
  std::vector<std::int32_t> places_;
  std::vector<R> shares_;
  Index y_ = 0, x_ = 0, n_ = -1;  // of the spots that are there

  static Spots<R> shifted(Spots<R> at, Index by) {
    for (int i = 0; i < 2; ++i) {
      at.y[i] += by, at.x[i] += by;
      at.mask_y[i] += by, at.mask_x[i] += by, at.colour_y[i] += by, at.colour_x[i] += by;
    }
    return at;
  }

  void share(const double* at, Index count, std::int32_t* const* pixel, R* const* mask, R* const* colour, Index n) {
    if (how_.sampling == Sampling::bilinear)
      vectorised(Share<R, false>(), at, count, pixel[0], pixel[1], mask[0], mask[1], colour[0], colour[1], n);
    else
      vectorised(Share<R, true>(), at, count, pixel[0], pixel[1], mask[0], mask[1], colour[0], colour[1], n);
  }

  Spots<R> spots(Index y, Index x, Index n) {
    places_.resize(std::size_t(4 * n));
    shares_.resize(std::size_t(8 * n));
    Spots<R> to;
    for (int i = 0; i < 2; ++i) {
      to.y[i] = places_.data() + i * n;
      to.x[i] = places_.data() + (2 + i) * n;
      to.mask_y[i] = shares_.data() + i * n;
      to.mask_x[i] = shares_.data() + (2 + i) * n;
      to.colour_y[i] = shares_.data() + (4 + i) * n;
      to.colour_x[i] = shares_.data() + (6 + i) * n;
    }
    if (y == y_ && x == x_ && n == n_) return to;
    y_ = y, x_ = x, n_ = n;
    at_.resize(std::size_t(2 * n));
    double* const at_y = at_.data();
    vectorised(Locate(), &o_, y, x, at_y, at_y + n, n);
    share(at_y, o_.h, to.y, to.mask_y, to.colour_y, n);
    share(at_y + n, o_.w, to.x, to.mask_x, to.colour_x, n);
    return to;
  }
};

// ---- forward

template <class S>
struct MaskSource {
  Reader<S> reader;
  void operator()(Index y, Index x, Index n, Real<S>* to) { reader.mask(y, x, n, to); }
};
struct FixedSource {
  const Composite* how;
  const Placed* o;
  void operator()(Index y, Index x, Index n, Fixed* to) const {
    vectorised(FixedShares(), at<Byte>(how->mask, o->first + (y - o->top) * o->w + x - o->left), to, n);
  }
};

template <class S>
void mix_row(Mix mix, const Real<S>* f, const Real<S>* a, const S* u, S* out, Index n) {
  switch (mix) {
    case Mix::over:
      return vectorised(MixRow<S, Mix::over>(), f, a, u, out, n);
    case Mix::difference:
      return vectorised(MixRow<S, Mix::difference>(), f, a, u, out, n);
    case Mix::over_premultiplied:
      return vectorised(MixRow<S, Mix::over_premultiplied>(), f, a, u, out, n);
    case Mix::difference_premultiplied:
      return vectorised(MixRow<S, Mix::difference_premultiplied>(), f, a, u, out, n);
  }
}

// A row's alpha as the values of a plane need it: as it is, or for each channel.
template <class T>
const T* for_channels(const Layout& layout, const T* alpha, Index n, std::vector<T>& room) {
  if (layout.step == 1) return alpha;
  room.resize(std::size_t(n * layout.step));
  repeat(alpha, room.data(), n, layout.step);
  return room.data();
}

// Rows [from, to) of the image, of object n on image b. What lies under them is the image, or yet the background.
struct Part {
  const Composite& how;
  const Placed& o;
  Index n, b, from, to;
  bool first;

  std::int32_t* ids(Index y) const { return how.ids + (b * how.H + y) * how.W + o.seen.x0; }
  template <class S>
  S* image(const Layout& layout, Index plane, Index y) const {
    return at<S>(how.image, layout.image(how, b, plane, y, o.seen.x0));
  }
  template <class S>
  const S* under(const Layout& layout, Index plane, Index y) const {
    return at<S>(first ? how.background : how.image, layout.image(how, b, plane, y, o.seen.x0));
  }
  template <class S>
  const S* pixels(const Layout& layout, Index plane, Index y) const {
    return at<S>(how.pixels, layout.object(o, how.C, plane, y - o.top, o.seen.x0 - o.left));
  }
};

template <class S>
class Drawing {
 public:
  // Returns how many pixels are labelled.
  Index draw(const Part& part) {
    if constexpr (std::is_same_v<S, Byte>) {
      const int radius = part.how.feather.radius;
      const bool straight = part.how.mix == Mix::over || part.how.mix == Mix::difference;
      if (is_copied(part.how) && straight && radius <= kMaxFixedRadius)
        return radius > 0 ? bytes_feathered(part) : bytes(part);
    }
    return any(part);
  }

 private:
  using R = Real<S>;
  std::vector<R> alpha_, repeated_, colours_, mask_;
  std::vector<Byte> repeated_bytes_;
  std::vector<Fixed> fixed_, repeated_fixed_;
  std::vector<Run> runs_;

  Index bytes(const Part& p) {
    const Layout layout(p.how);
    const Index width = p.o.seen.width();
    Index count = 0;
    for (Index y = p.from; y < p.to; ++y) {
      const Byte* const mask = byte_mask(p, y);
      count += label(p, y, mask, Byte(128));
      find_runs(mask, width, runs_);
      const bool some = std::any_of(runs_.begin(), runs_.end(), [](const Run& r) { return r.kind != Run::none; });
      const Byte* const alpha = some ? for_channels(layout, mask, width, repeated_bytes_) : mask;
      for (Index c = 0; c < layout.planes; ++c)
        mix_runs(p, layout.step, p.template pixels<Byte>(layout, c, y), alpha, p.template under<Byte>(layout, c, y),
                 p.template image<Byte>(layout, c, y));
    }
    return count;
  }

  void mix_runs(const Part& p, Index step, const Byte* f, const Byte* alpha, const Byte* u, Byte* out) {
    for (const Run& run : runs_) {
      const Index i = run.from * step, n = (run.end - run.from) * step;
      if (run.kind == Run::none) {
        if (p.first) std::memcpy(out + i, u + i, std::size_t(n));
      } else if (p.how.mix == Mix::difference) {
        mix_bytes<Mix::difference>(f + i, alpha + i, u + i, out + i, n);
      } else if (run.kind == Run::all) {
        std::memcpy(out + i, f + i, std::size_t(n));
      } else {
        mix_bytes<Mix::over>(f + i, alpha + i, u + i, out + i, n);
      }
    }
  }

  template <class T>
  Index label(const Part& p, Index y, const T* mask, T half) {
    if (p.how.ids == nullptr) return 0;
    return vectorised(Label<T>(), mask, half, std::int32_t(p.n), p.ids(y), p.o.seen.width());
  }

  Index bytes_feathered(const Part& p) {
    const Layout layout(p.how);
    const Index width = p.o.seen.width();
    Blurred<Fixed, FixedSource> blurred(p.how, p.o, {&p.how, &p.o});
    fixed_.resize(std::size_t(width));
    Index count = 0;
    for (Index y = p.from; y < p.to; ++y) {
      count += label(p, y, byte_mask(p, y), Byte(128));
      blurred.row(y, fixed_.data());
      const Fixed* const alpha = for_channels(layout, static_cast<const Fixed*>(fixed_.data()), width, repeated_fixed_);
      for (Index c = 0; c < layout.planes; ++c)
        mix_fixed(p.template pixels<Byte>(layout, c, y), alpha, p.template under<Byte>(layout, c, y),
                  p.template image<Byte>(layout, c, y), width * layout.step);
    }
    return count;
  }

  static const Byte* byte_mask(const Part& p, Index y) {
    return at<Byte>(p.how.mask, p.o.first + (y - p.o.top) * p.o.w + p.o.seen.x0 - p.o.left);
  }

  Index any(const Part& p) {
    const Layout layout(p.how);
    const Index width = p.o.seen.width(), x = p.o.seen.x0, length = width * layout.step;
    Blurred<R, MaskSource<S>> blurred(p.how, p.o, {Reader<S>(p.how, p.o)});
    Reader<S> reader(p.how, p.o);
    alpha_.resize(std::size_t(width));
    colours_.resize(std::size_t(width * p.how.C + 1));
    Index count = 0;
    for (Index y = p.from; y < p.to; ++y) {
      const bool feathered = p.how.feather.radius > 0;
      if (!feathered || p.how.ids != nullptr) reader.mask(y, x, width, alpha_.data());
      count += label(p, y, static_cast<const R*>(alpha_.data()), R(0.5));
      if (feathered) blurred.row(y, alpha_.data());
      const R* const alpha = for_channels(layout, static_cast<const R*>(alpha_.data()), width, repeated_);
      const bool in_place = std::is_same_v<S, R> && is_copied(p.how);
      const bool hides = colour_clamped(p.how);  // where alpha is 0
      if (!in_place) reader.colours(y, x, width, hides ? alpha_.data() : nullptr, colours_.data());
      for (Index c = 0; c < layout.planes; ++c) {
        const R* f = colours_.data() + c * length;
        if constexpr (std::is_same_v<S, R>)
          if (in_place) f = p.template pixels<S>(layout, c, y);
        mix_row<S>(p.how.mix, f, alpha, p.template under<S>(layout, c, y), p.template image<S>(layout, c, y), length);
      }
    }
    return count;
  }
};

std::vector<Placed> placed_all(const Composite& how) {
  std::vector<Placed> all(std::size_t(how.N));
  for (Index n = 0; n < how.N; ++n) all[std::size_t(n)] = placed(how, n);
  return all;
}

// Rows of an image that one thread takes at a time: few enough to stay in the cache.
Index band_rows(const Composite& how, std::size_t bytes) {
  constexpr Index kBytes = 192 * 1024;
  return std::clamp<Index>(kBytes / std::max<Index>(1, how.W * how.C * Index(bytes)), 16, 64);
}

// Calls body(image, first row, end) in parallel.
template <class Body>
void for_bands(const Composite& how, std::size_t bytes, Body body) {
  const Index rows = band_rows(how, bytes), bands = (how.H + rows - 1) / rows;
  constexpr Index kGrain = 1 << 15;  // values, below which a thread more is no gain
  const Index grain = std::max<Index>(1, kGrain / std::max<Index>(1, rows * how.W * how.C));
  at::parallel_for(0, how.B * bands, grain, [&](Index first, Index last) {
    for (Index k = first; k < last; ++k) {
      const Index start = k % bands * rows;
      body(k / bands, start, std::min(how.H, start + rows));
    }
  });
}

template <class S>
void copy_rows(const Composite& how, Index b, Index from, Index to) {
  const Layout layout(how);
  for (Index c = 0; c < layout.planes; ++c) {
    const Index start = layout.image(how, b, c, from, 0);
    std::memcpy(at<S>(how.image, start), at<S>(how.background, start),
                std::size_t((to - from) * how.W * layout.step) * sizeof(S));
  }
}

template <class S>
void composite_as(const Composite& how) {
  const std::vector<Placed> all = placed_all(how);
  if (how.ids != nullptr) std::fill_n(how.area, how.N, Index(0));
  for_bands(how, sizeof(S), [&](Index b, Index from, Index to) {
    Drawing<S> drawing;
    bool copied = false;
    if (how.ids != nullptr) std::fill_n(how.ids + (b * how.H + from) * how.W, (to - from) * how.W, -1);
    for (Index n = begin_of(how, b); n < begin_of(how, b + 1); ++n) {
      const Placed& o = all[std::size_t(n)];
      const Index first = std::max(from, o.seen.y0), end = std::min(to, o.seen.y1);
      if (o.seen.empty() || first >= end) continue;
      const bool covers = first == from && end == to && o.seen.x0 == 0 && o.seen.x1 == how.W;
      if (!copied && !covers) copy_rows<S>(how, b, from, to);
      const Index count = drawing.draw({how, o, n, b, first, end, !copied && covers});
      copied = true;
      if (count > 0) __atomic_fetch_add(how.area + n, count, __ATOMIC_RELAXED);
    }
    if (!copied) copy_rows<S>(how, b, from, to);
  });
}

// ---- backward

// Whether some pixel belongs to two objects, as where one is drawn twice.
bool share_pixels(std::vector<Placed> all) {
  std::sort(all.begin(), all.end(), [](const Placed& a, const Placed& b) { return a.first < b.first; });
  Index end = 0;
  for (const Placed& o : all) {
    if (o.h * o.w == 0) continue;
    if (o.first < end) return true;
    end = o.first + o.h * o.w;
  }
  return false;
}

// Of every object, in the type computed with: the derivatives by its alpha and by its colours, of what is seen of it.
// Where they are the result they lie in it; else the result is summed up of them.
template <class S>
class Gradients {
 public:
  using R = Real<S>;

  Gradients(const CompositeBackward& how, const std::vector<Placed>& all) : how_(how) {
    shared = share_pixels(all);
    const Composite& f = how.forward;
    const bool same = std::is_same_v<S, R> && is_copied(f) && !shared;
    colours_in_place = same;
    alpha_in_place = same && f.feather.radius == 0;
    wants_colours = how.pixels != nullptr || how.matrix != nullptr;
    wants_alpha = how.mask != nullptr || how.matrix != nullptr;
    start_.reserve(all.size() + 1);
    Index sum = 0, covered = 0;
    for (const Placed& o : all) start_.push_back(sum), sum += o.seen.area(), covered += o.h * o.w;
    if (wants_colours && !colours_in_place) colours_ = std::make_unique_for_overwrite<R[]>(std::size_t(sum * f.C));
    if (wants_alpha && !alpha_in_place) alpha_ = std::make_unique_for_overwrite<R[]>(std::size_t(sum));
    const bool all_covered = covered == f.P && !shared;
    pixel_sums = sums(how.pixels, f.P * f.C, colours_in_place && all_covered, pixel_room_);
    mask_sums = sums(how.mask, f.P, is_copied(f) && std::is_same_v<S, R> && all_covered, mask_room_);
  }

  // Sums that were not made in the result.
  void store() {
    narrow(pixel_room_, how_.pixels);
    narrow(mask_room_, how_.mask);
  }

  R *pixel_sums, *mask_sums;  // [P * C] and [P], or null
  bool colours_in_place, alpha_in_place, wants_colours, wants_alpha, shared;

  // [planes, height, width * step] of what is seen.
  R* colours(Index n) const { return colours_.get() + start_[std::size_t(n)] * how_.forward.C; }
  R* alpha(Index n) const { return alpha_.get() + start_[std::size_t(n)]; }

  // Where row y of object n goes, or null.
  R* colour_row(const Layout& layout, const Placed& o, Index n, Index plane, Index y) const {
    if (!wants_colours) return nullptr;
    if (colours_in_place)
      return static_cast<R*>(how_.pixels) + layout.object(o, how_.forward.C, plane, y - o.top, o.seen.x0 - o.left);
    return colours(n) + ((plane * o.seen.height() + y - o.seen.y0) * o.seen.width()) * layout.step;
  }
  R* alpha_row(const Placed& o, Index n, Index y) const {
    if (!wants_alpha) return nullptr;
    if (alpha_in_place) return static_cast<R*>(how_.mask) + o.first + (y - o.top) * o.w + o.seen.x0 - o.left;
    return alpha(n) + (y - o.seen.y0) * o.seen.width();
  }

 private:
  const CompositeBackward& how_;
  std::vector<Index> start_;
  std::unique_ptr<R[]> colours_, alpha_;
  std::vector<R> pixel_room_, mask_room_;

  // All 0, unless every one of them will be written to.
  R* sums(void* out, Index count, bool all_written, std::vector<R>& room) {
    if (out == nullptr) return nullptr;
    if constexpr (!std::is_same_v<S, R>) {
      room.assign(std::size_t(count), R(0));
      return room.data();
    }
    if (!all_written) std::fill_n(static_cast<R*>(out), count, R(0));
    return static_cast<R*>(out);
  }
  void narrow(const std::vector<R>& room, void* out) {
    if (!room.empty()) vectorised(Narrow<S>(), room.data(), static_cast<S*>(out), Index(room.size()));
  }
};

// A row's values, of each plane.
template <class T>
struct Planes {
  T* first;
  Index stride;
  T* operator[](Index plane) const { return first + plane * stride; }
};

// One object in a band of the backward pass, and what of it the current row needs: where it is, if it is there.
template <class S>
struct Layer {
  using R = Real<S>;
  const Placed* o;
  Index n;
  Reader<S> reader;
  Blurred<R, MaskSource<S>> blurred;
  std::vector<R> colour_room, alpha_room, repeated, under_room;
  Planes<const R> colours{}, under{};
  const R* alpha = nullptr;

  Layer(const Composite& how, const Placed& placed, Index number)
      : o(&placed), n(number), reader(how, placed), blurred(how, placed, {Reader<S>(how, placed)}) {}

  bool is_on(Index y) const { return o->seen.y0 <= y && y < o->seen.y1; }

  // `image` is the row of the image that lies under the object; if `draws` the object is drawn on it.
  void read(const Composite& how, const Layout& layout, Index y, Planes<S> image, bool draws) {
    const Index width = o->seen.width(), x = o->seen.x0, length = width * layout.step;
    const bool in_place = std::is_same_v<S, R> && is_copied(how);
    const Index row = y - o->top, column = x - o->left;
    alpha_room.resize(std::size_t(width));
    const R* shares = alpha_room.data();
    if (how.feather.radius > 0)
      blurred.row(y, alpha_room.data());
    else if (in_place)
      shares = at<R>(how.mask, o->first + row * o->w + column);
    else
      reader.mask(y, x, width, alpha_room.data());
    alpha = for_channels(layout, shares, width, repeated);
    if (in_place) {
      colours = {at<R>(how.pixels, layout.object(*o, how.C, 0, row, column)), o->h * o->w};
    } else {
      colour_room.resize(std::size_t(width * how.C + 1));
      reader.colours(y, x, width, nullptr, colour_room.data());
      colours = {colour_room.data(), length};
    }
    const Planes<S> below{image.first + x * layout.step, image.stride};
    under = keep(below, layout.planes, length, draws);
    for (Index c = 0; c < layout.planes && draws; ++c)
      mix_row<S>(how.mix, colours[c], alpha, below[c], below[c], length);
  }

  Planes<const R> keep(Planes<S> below, Index planes, Index length, bool changes) {
    if constexpr (std::is_same_v<S, R>)
      if (!changes) return {below.first, below.stride};
    under_room.resize(std::size_t(planes * length));
    for (Index c = 0; c < planes; ++c)
      vectorised(Widen<S>(), static_cast<const S*>(below[c]), under_room.data() + c * length, length);
    return {under_room.data(), length};
  }
};

template <class R>
void slope_row(Mix mix, const R* g, const R* f, const R* a, const R* u, R* by_f, R* by_alpha, bool add, R* by_u,
               Index n) {
  switch (mix) {
    case Mix::over:
      return vectorised(SlopeRow<R, Mix::over>(), g, f, a, u, by_f, by_alpha, add, by_u, n);
    case Mix::difference:
      return vectorised(SlopeRow<R, Mix::difference>(), g, f, a, u, by_f, by_alpha, add, by_u, n);
    case Mix::over_premultiplied:
      return vectorised(SlopeRow<R, Mix::over_premultiplied>(), g, f, a, u, by_f, by_alpha, add, by_u, n);
    case Mix::difference_premultiplied:
      return vectorised(SlopeRow<R, Mix::difference_premultiplied>(), g, f, a, u, by_f, by_alpha, add, by_u, n);
  }
}

// Rows [from, to) of image b, from the topmost object down.
template <class S>
class BandBackward {
 public:
  using R = Real<S>;

  BandBackward(const CompositeBackward& how, const Gradients<S>& gradients)
      : how_(how), f_(how.forward), layout_(how.forward), gradients_(gradients) {}

  void run(const std::vector<Placed>& all, Index b, Index from, Index to) {
    const Index begin = begin_of(f_, b), end = begin_of(f_, b + 1);
    layers_.reserve(std::size_t(end - begin));
    for (Index n = begin; n < end; ++n) {
      const Placed& o = all[std::size_t(n)];
      if (!o.seen.empty() && o.seen.y0 < to && o.seen.y1 > from) layers_.emplace_back(f_, o, n);
    }
    g_.resize(std::size_t(f_.W * f_.C));
    image_.resize(g_.size());
    for (Index y = from; y < to; ++y) row(b, y);
  }

 private:
  static constexpr bool kSame = std::is_same_v<S, R>;
  const CompositeBackward& how_;
  const Composite& f_;
  Layout layout_;
  const Gradients<S>& gradients_;
  std::vector<Layer<S>> layers_;
  std::vector<R> g_, by_colour_, by_alpha_;
  std::vector<S> image_;

  // The row of the image, in memory that is of the image's shape.
  template <class T>
  Planes<T> row_of(T* data, Index b, Index y) const {
    return {data + layout_.image(f_, b, 0, y, 0), f_.H * f_.W * layout_.step};
  }

  // One object that fills the row is passed through from the gradient to the result; else they are copied first.
  void row(Index b, Index y) {
    const Index length = f_.W * layout_.step;
    const auto is_on = [&](const Layer<S>& layer) { return layer.is_on(y); };
    const auto count = std::count_if(layers_.begin(), layers_.end(), is_on);
    const Planes<const S> given = row_of(static_cast<const S*>(how_.grad), b, y);
    Planes<R> g{g_.data(), length};
    if constexpr (kSame)
      if (how_.background != nullptr) g = row_of(static_cast<R*>(how_.background), b, y);
    // Nothing writes to the background: what is drawn on is a copy.
    Planes<S> image = row_of(static_cast<S*>(const_cast<void*>(f_.background)), b, y);
    if (count > 1) {
      for (Index c = 0; c < layout_.planes; ++c)
        std::memcpy(image_.data() + c * length, image[c], std::size_t(length) * sizeof(S));
      image = {image_.data(), length};
    }
    Planes<const R> g_in{g.first, g.stride};
    const auto first = std::find_if(layers_.begin(), layers_.end(), is_on);
    if (kSame && count == 1 && first->o->seen.width() == f_.W) {
      if constexpr (kSame) g_in = given;
    } else {
      for (Index c = 0; c < layout_.planes; ++c) vectorised(Widen<S>(), given[c], g[c], length);
    }
    for (Layer<S>& layer : layers_)
      if (is_on(layer)) layer.read(f_, layout_, y, image, count > 1);
    for (auto layer = layers_.rbegin(); layer != layers_.rend(); ++layer)
      if (is_on(*layer)) through(*layer, y, g_in, g);
    if constexpr (!kSame)
      for (Index c = 0; c < layout_.planes && how_.background != nullptr; ++c)
        vectorised(Narrow<S>(), static_cast<const R*>(g[c]), row_of(static_cast<S*>(how_.background), b, y)[c], length);
  }

  void through(const Layer<S>& layer, Index y, Planes<const R> g, Planes<R> out) {
    const Placed& o = *layer.o;
    const Index width = o.seen.width(), length = width * layout_.step, x = o.seen.x0 * layout_.step;
    by_colour_.resize(std::size_t(length));
    by_alpha_.resize(std::size_t(length));
    R* const alpha_row = gradients_.alpha_row(o, layer.n, y);
    R* const by_alpha = layout_.step == 1 && alpha_row != nullptr ? alpha_row : by_alpha_.data();
    for (Index c = 0; c < layout_.planes; ++c) {
      R* const colour_row = gradients_.colour_row(layout_, o, layer.n, c, y);
      slope_row<R>(f_.mix, g[c] + x, layer.colours[c], layer.alpha, layer.under[c],
                   colour_row != nullptr ? colour_row : by_colour_.data(), by_alpha, c > 0, out[c] + x, length);
    }
    if (layout_.step > 1 && alpha_row != nullptr)
      vectorised(SumRepeated<R>(), static_cast<const R*>(by_alpha_.data()), alpha_row, width, layout_.step);
  }
};

// The transpose of a blur: from the derivative by the blurred mask, of what is seen, to that by the mask within reach.
template <class R>
class Unblurred {
 public:
  Unblurred(const Composite& how, const Placed& o, const R* by_alpha)
      : o_(o),
        within_(reach(how, o)),
        by_alpha_(by_alpha),
        radius_(how.feather.radius),
        zero_(how.feather.zero_edge),
        taps_(taps_of<R>(how.feather, true)),
        width_(o.seen.width()),
        column_(std::size_t(width_)),
        sum_(std::size_t(width_ + 4 * radius_)),
        wide_(std::size_t(width_ + 2 * radius_)),
        nothing_(std::size_t(width_)) {}

  // Row y of the image, columns as within reach.
  void row(Index y, R* out) {
    const Index height = o_.box.height();
    R* const sum = sum_.data() + 2 * radius_;
    down(y, sum);
    if (!zero_)
      for (Index d = 1; d <= radius_; ++d)
        for (const Index outside : {-d, height - 1 + d})
          if (o_.box.y0 + mirrored(outside, height) == y) {
            down(o_.box.y0 + outside, column_.data());
            for (Index i = 0; i < width_; ++i) sum[i] += column_[std::size_t(i)];
          }
    weigh_along(static_cast<const R*>(sum_.data()), taps_, wide_.data(), width_ + 2 * radius_);
    // Column i of `wide_` is that of the image less this.
    const Index start = o_.seen.x0 - radius_;
    std::copy_n(wide_.data() + within_.x0 - start, within_.width(), out);
    if (zero_) return;
    const auto fold = [&](Index from, Index end) {
      for (Index x = from; x < end; ++x)
        out[o_.box.x0 + mirrored(x - o_.box.x0, o_.box.width()) - within_.x0] += wide_[std::size_t(x - start)];
    };
    fold(start, within_.x0);
    fold(within_.x1, start + width_ + 2 * radius_);
  }

 private:
  const Placed& o_;
  Box within_;
  const R* by_alpha_;
  Index radius_;
  bool zero_;
  std::vector<R> taps_;
  Index width_;
  std::vector<R> column_, sum_, wide_, nothing_;

  void down(Index y, R* out) {
    const R* rows[2 * kMaxRadius + 1];
    for (Index k = 0; k <= 2 * radius_; ++k) {
      const Index at = y - radius_ + k;
      const bool is_seen = at >= o_.seen.y0 && at < o_.seen.y1;
      rows[k] = is_seen ? by_alpha_ + (at - o_.seen.y0) * width_ : nothing_.data();
    }
    vectorised(Weigh<R>(), static_cast<const R* const*>(rows), static_cast<const R*>(taps_.data()), int(radius_), out,
               width_);
  }
};

// From the derivatives by what is seen of object n to those by its pixels, its mask and its matrix.
template <class S>
class ObjectBackward {
 public:
  using R = Real<S>;

  ObjectBackward(const CompositeBackward& how, const Gradients<S>& gradients, const Placed& o, Index n)
      : how_(how), f_(how.forward), gradients_(gradients), layout_(how.forward), o_(o), n_(n) {}

  void run() {
    if (how_.matrix != nullptr) std::fill_n(how_.matrix + 9 * n_, 9, 0.0);
    if (o_.h <= 0 || o_.w <= 0) return;
    if (gradients_.wants_colours) colours();
    if (gradients_.wants_alpha) mask();
    if (how_.matrix != nullptr && !o_.seen.empty()) through_inverse(o_.inverse, by_inverse_, how_.matrix + 9 * n_);
  }

 private:
  const CompositeBackward& how_;
  const Composite& f_;
  const Gradients<S>& gradients_;
  Layout layout_;
  const Placed& o_;
  Index n_;
  double by_inverse_[9] = {};

  Index pixels() const { return o_.h * o_.w; }

  void colours() {
    if (gradients_.colours_in_place) return zero_outside(how_.pixels, o_.first * f_.C, layout_.planes, layout_.step);
    R* const to = gradients_.pixel_sums == nullptr ? nullptr : gradients_.pixel_sums + o_.first * f_.C;
    const S* const values = at<S>(f_.pixels, o_.first * f_.C);
    const R* const given = gradients_.colours(n_);
    const bool clamped = colour_clamped(f_);
    const Index width = o_.seen.width(), height = o_.seen.height();
    vectorised([&]() __attribute__((always_inline)) {
      for (Index y = o_.seen.y0; y < o_.seen.y1; ++y)
        for (Index x = o_.seen.x0; x < o_.seen.x1; ++x) {
          const Index k = (y - o_.seen.y0) * width + x - o_.seen.x0;
          const auto by = [&](Index p, Index s) { return given[(p * height * width + k) * layout_.step + s]; };
          spread(y, x, clamped, values, to, by, [](S value) { return load(value); }, layout_.planes, layout_.step);
        }
    });
  }

  // What is drawn one for one has its derivatives already, but for what lies outside the image.
  void zero_outside(void* out, Index first, Index planes, Index step) {
    if (out == nullptr || o_.seen.area() == pixels()) return;
    S* const data = at<S>(out, first);
    for (Index p = 0; p < planes; ++p)
      for (Index i = 0; i < o_.h; ++i) {
        S* const row = data + (p * o_.h + i) * o_.w * step;
        const bool is_seen = o_.top + i >= o_.seen.y0 && o_.top + i < o_.seen.y1;
        const Index from = is_seen ? o_.seen.x0 - o_.left : o_.w, to = is_seen ? o_.seen.x1 - o_.left : o_.w;
        std::memset(static_cast<void*>(row), 0, std::size_t(from * step) * sizeof(S));
        std::memset(static_cast<void*>(row + to * step), 0, std::size_t((o_.w - to) * step) * sizeof(S));
      }
  }

  void mask() {
    if (gradients_.alpha_in_place) return zero_outside(how_.mask, o_.first, 1, 1);
    R* const to = gradients_.mask_sums == nullptr ? nullptr : gradients_.mask_sums + o_.first;
    const Box within = reach(f_, o_);
    if (to != nullptr && f_.sampling == Sampling::shift && within.area() < pixels() && !gradients_.shared)
      std::fill_n(to, pixels(), R(0));
    const R* const by_alpha = gradients_.alpha(n_);
    Unblurred<R> unblurred(f_, o_, by_alpha);
    std::vector<R> row(std::size_t(within.width()));
    for (Index y = within.y0; y < within.y1; ++y) {
      if (f_.feather.radius > 0)
        unblurred.row(y, row.data());
      else
        std::copy_n(by_alpha + (y - within.y0) * within.width(), within.width(), row.data());
      mask_row(y, within, row.data(), to);
    }
  }
  void mask_row(Index y, const Box& within, const R* by, R* to) {
    if (f_.sampling == Sampling::shift) {
      if (y < o_.top || y >= o_.top + o_.h) return;
      const Index from = std::max(within.x0, o_.left), end = std::min(within.x1, o_.left + o_.w);
      R* const row = to + (y - o_.top) * o_.w - o_.left;
      for (Index x = from; x < end; ++x) row[x] = (gradients_.shared ? row[x] : R(0)) + by[x - within.x0];
      return;
    }
    const S* const values = at<S>(f_.mask, o_.first);
    for (Index x = within.x0; x < within.x1; ++x)
      spread(
          y, x, false, values, to, [&](Index, Index) { return by[x - within.x0]; },
          [](S value) { return share_of(value); }, 1, 1);
  }

  // Adds the derivatives by what pixel (y, x) of the image reads to those of the up to four pixels that it reads, and
  // to those by the inverse matrix.
  template <class By, class Value>
  FN_BODY void spread(Index y, Index x, bool clamped, const S* values, R* to, By by, Value value, Index planes,
                      Index step) {
    const Reading<R> r = reading<R>(f_, o_, y, x, clamped);
    if (r.nothing()) return;
    const bool moves = how_.matrix != nullptr && f_.sampling == Sampling::bilinear;
    R by_y = 0, by_x = 0;
    for (int corner = 0; corner < 4; ++corner) {
      const int i = corner / 2, j = corner % 2;
      const R share = r.y.share[i] * r.x.share[j], slope_y = r.y.slope[i] * r.x.share[j],
              slope_x = r.y.share[i] * r.x.slope[j];
      if (share == 0 && slope_y == 0 && slope_x == 0) continue;
      const Index at = (i ? r.y.high : r.y.low) * o_.w + (j ? r.x.high : r.x.low);
      for (Index p = 0; p < planes; ++p)
        for (Index s = 0; s < step; ++s) {
          const Index k = (p * pixels() + at) * step + s;
          const R g = by(p, s);
          if (to != nullptr) to[k] += share * g;
          if (!moves) continue;
          const R v = value(values[k]);
          by_y += slope_y * v * g;
          by_x += slope_x * v * g;
        }
    }
    if (moves) add_to_inverse(r, y, x, double(by_y), double(by_x), by_inverse_);
  }
};

template <class S>
void composite_backward_as(const CompositeBackward& how) {
  const Composite& f = how.forward;
  const std::vector<Placed> all = placed_all(f);
  Gradients<S> gradients(how, all);
  for_bands(f, sizeof(S),
            [&](Index b, Index from, Index to) { BandBackward<S>(how, gradients).run(all, b, from, to); });
  if (how.pixels == nullptr && how.mask == nullptr && how.matrix == nullptr) return;
  const auto run = [&](Index first, Index last) {
    for (Index n = first; n < last; ++n) ObjectBackward<S>(how, gradients, all[std::size_t(n)], n).run();
  };
  if (gradients.shared)
    run(0, f.N);
  else
    at::parallel_for(0, f.N, 1, run);
  gradients.store();
}

void composite_cpu(const Composite& how) {
  for_pixels(how.dtype, [&](auto of) { composite_as<decltype(of)>(how); });
}

void composite_backward_cpu(const CompositeBackward& how) {
  for_pixels(how.forward.dtype, [&](auto of) {
    if constexpr (!std::is_same_v<decltype(of), Byte>) composite_backward_as<decltype(of)>(how);
  });
}

const Kernels kCpu{composite_cpu, composite_backward_cpu};
const Register<Kernels> kRegistered(at::kCPU, kCpu);

}  // namespace
}  // namespace fastnuggets::composite

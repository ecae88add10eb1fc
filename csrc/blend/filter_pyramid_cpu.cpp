// CPU kernels of pyramids and of the multi-band blend. A unit of work is a band of rows, which is filtered down its
// columns into one row and then along it, so that all that is read twice is in the first cache. Levels above the first
// are of the type that is computed in; differences of bytes are 16-bit integers until they are filtered along.
#include "blend/filter_cpu.h"
#include "blend/filter_op.h"

namespace fastnuggets::filter {
namespace {

constexpr Index kBand = 16;  // rows of a unit
constexpr Index kSlots = 8;  // rows that a ring holds; a step down needs 5

template <class S>
using Real = typename Compute<S>::type;

// ---- down the columns: a weighted sum of rows

template <int count, class S, class T>
FN_BODY void combine_rows(const S* const* row, const T* weight, Index n, T* out) {
  const S *const r0 = row[0], *const r1 = row[count > 1 ? 1 : 0], *const r2 = row[count > 2 ? 2 : 0],
                 *const r3 = row[count > 3 ? 3 : 0], *const r4 = row[count > 4 ? 4 : 0];
  const T w0 = weight[0], w1 = weight[count > 1 ? 1 : 0], w2 = weight[count > 2 ? 2 : 0],
          w3 = weight[count > 3 ? 3 : 0], w4 = weight[count > 4 ? 4 : 0];
#pragma omp simd
  for (Index i = 0; i < n; ++i) {
    T sum = T(w0 * T(r0[i]));
    if constexpr (count > 1) sum = T(sum + w1 * T(r1[i]));
    if constexpr (count > 2) sum = T(sum + w2 * T(r2[i]));
    if constexpr (count > 3) sum = T(sum + w3 * T(r3[i]));
    if constexpr (count > 4) sum = T(sum + w4 * T(r4[i]));
    out[i] = sum;
  }
}

// `scale` makes the weights integers where T is one.
template <class S, class T>
FN_BODY void combine(const S* const* row, const AxisTaps& taps, float scale, Index n, T* out) {
  T weight[AxisTaps::kMost];
  for (int k = 0; k < AxisTaps::kMost; ++k) weight[k] = T(scale * taps.weight[k]);
  switch (taps.count) {
    case 1:
      return combine_rows<1>(row, weight, n, out);
    case 2:
      return combine_rows<2>(row, weight, n, out);
    case 3:
      return combine_rows<3>(row, weight, n, out);
    case 4:
      return combine_rows<4>(row, weight, n, out);
    default:
      return combine_rows<5>(row, weight, n, out);
  }
}

// ---- along a row

// What the ends of an axis add to the formula of its middle with zeros outside.
template <class R>
struct Ends {
  struct Extra {
    Index out, in;
    R weight;
  };
  Extra extra[16];
  int count = 0;

  Ends(Step step, Index in_size, Index out_size) {
    const float scale = step == Step::down || step == Step::down_transposed ? 0.0625f : 0.125f;
    for (Index out = 0; out < out_size; ++out) {
      if (out == 4 && out_size > 8) out = out_size - 4;
      const AxisTaps taps = axis_taps(step, out, in_size, out_size);
      for (int k = 0; k < taps.count; ++k) {
        const Index in = taps.first + k;
        const float middle = scale * float(coarsens(step) ? binomial(in - 2 * out) : binomial(out - 2 * in));
        if (taps.weight[k] != middle) extra[count++] = {out, in, R(taps.weight[k] - middle)};
      }
    }
  }

  template <class T>
  FN_BODY void add(const T* in, Index I, R scale, R* out) const {
    for (int k = 0; k < count; ++k)
      for (Index c = 0; c < I; ++c) out[extra[k].out * I + c] += scale * extra[k].weight * R(in[extra[k].in * I + c]);
  }
};

// Pixels of I numbers: every second from `from`, or to every second of `to`. Those of 3 move as 4, the last of which
// the next one overwrites.
template <class R>
FN_BODY void move_pixels(const R* from, Index from_step, Index I, Index pixels, R* to, Index to_step) {
  if (I == 3 || I == 4) {
    for (Index x = 0; x < pixels; ++x) std::memcpy(to + x * to_step, from + x * from_step, 4 * sizeof(R));
  } else {
    for (Index x = 0; x < pixels; ++x)
      for (Index c = 0; c < I; ++c) to[x * to_step + c] = from[x * from_step + c];
  }
}

template <class T, class R>
FN_BODY void split(const T* in, Index I, Index pixels, R* even, R* odd) {
  if (I == 1 && std::is_same_v<T, std::int16_t>) {
    // Two of them are a word.
#pragma omp simd
    for (Index x = 0; x < pixels; ++x) {
      std::uint32_t word;
      std::memcpy(&word, in + 2 * x, sizeof word);
      even[x] = R(std::int32_t(word << 16) >> 16);
      odd[x] = R(std::int32_t(word) >> 16);
    }
  } else if (I == 1) {
#pragma omp simd
    for (Index x = 0; x < pixels; ++x) {
      even[x] = R(in[2 * x]);
      odd[x] = R(in[2 * x + 1]);
    }
  } else if constexpr (std::is_same_v<T, R>) {
    move_pixels(in, 2 * I, I, pixels, even, I);
    move_pixels(in + I, 2 * I, I, pixels, odd, I);
  }
}

// Buffers of a thread for rows of so many pixels of I numbers, each with zeros on both sides: the pixels that the
// filters read there, and what may be written past the end.
template <class R>
class Buffers {
 public:
  Buffers(Index pixels, Index I, int count)
      : room_(4 * I + 16), stride_(pixels * I + 2 * room_), memory_(std::size_t(stride_ * count)) {}
  FN_BODY R* row(int k) { return memory_.data() + k * stride_ + room_; }

 private:
  Index room_, stride_;
  std::vector<R> memory_;
};

// 1 4 6 4 1 at every second pixel of `in` (zeros on both sides), times scale / 16. even, odd: a row each.
template <class T, class R>
FN_BODY void coarsen_row(const T* in, Index I, Index out_pixels, R scale, const Ends<R>& ends, R ends_scale, R* even,
                         R* odd, R* whole, R* out) {
  const Index n = out_pixels * I;
  if constexpr (!std::is_same_v<T, R>) {
    if (I != 1) {
      const Index in_pixels = 2 * out_pixels + 2;
#pragma omp simd
      for (Index i = 0; i < in_pixels * I; ++i) whole[i] = R(in[i]);
      split(static_cast<const R*>(whole), I, out_pixels + 1, even, odd);
    } else {
      split(in, I, out_pixels + 1, even, odd);
    }
  } else {
    split(in, I, out_pixels + 1, even, odd);
  }
  const R s1 = scale / 16, s4 = 4 * s1, s6 = 6 * s1;
  const R *const before = even - I, *const after = even + I, *const odd_before = odd - I;
#pragma omp simd
  for (Index i = 0; i < n; ++i) out[i] = s1 * (before[i] + after[i]) + s6 * even[i] + s4 * (odd_before[i] + odd[i]);
  ends.add(in, I, ends_scale, out);
}

// 1 6 1 and 4 4 of `in` (zeros on both sides), times scale / 8, in turn: 2 in_pixels pixels.
template <class R>
FN_BODY void expand_row(const R* in, Index I, Index in_pixels, R scale, const Ends<R>& ends, R* even, R* odd, R* out) {
  const R s1 = scale / 8, s4 = 4 * s1, s6 = 6 * s1;
  const R *const before = in - I, *const after = in + I;
  if (I == 1) {
#pragma omp simd
    for (Index x = 0; x < in_pixels; ++x) {
      out[2 * x] = s1 * (before[x] + after[x]) + s6 * in[x];
      out[2 * x + 1] = s4 * (in[x] + after[x]);
    }
  } else {
    const Index n = in_pixels * I;
#pragma omp simd
    for (Index i = 0; i < n; ++i) {
      even[i] = s1 * (before[i] + after[i]) + s6 * in[i];
      odd[i] = s4 * (in[i] + after[i]);
    }
    for (Index x = 0; x < in_pixels; ++x) {
      move_pixels(even + x * I, I, I, 1, out + 2 * x * I, I);
      move_pixels(odd + x * I, I, I, 1, out + (2 * x + 1) * I, I);
    }
  }
  ends.add(in, I, R(1), out);
}

// ---- what a step coarsens: planes of rows

template <class S>
struct Stored {
  using Stores = S;
  static constexpr bool direct = true;
  const S* data;
  Index plane_size, n;
  FN_BODY const S* row(Index plane, Index y) const { return data + plane * plane_size + y * n; }
};

template <class S>
struct Difference {
  using Stores = std::conditional_t<std::is_same_v<S, std::uint8_t>, std::int16_t, S>;
  static constexpr bool direct = false;
  const S *first, *second;
  Index plane_size, n;
  FN_BODY void fill(Index plane, Index y, Stores* to) const {
    const S* const a = first + plane * plane_size + y * n;
    const S* const b = second + plane * plane_size + y * n;
#pragma omp simd
    for (Index i = 0; i < n; ++i) to[i] = Stores(Stores(a[i]) - Stores(b[i]));
  }
};

// A mask's row as R, for pixels of I numbers.
template <class S, class R>
FN_BODY void mask_row(const S* mask, Index pixels, Index I, R* to) {
  constexpr R scale = std::is_same_v<S, std::uint8_t> ? R(1) / R(255) : R(1);
  if (I == 1) {
#pragma omp simd
    for (Index x = 0; x < pixels; ++x) to[x] = scale * R(mask[x]);
  } else if (I <= 4) {
    for (Index x = 0; x < pixels; ++x) {
      const R m = scale * R(mask[x]);
      const R four[4] = {m, m, m, m};
      std::memcpy(to + x * I, four, sizeof four);
    }
  } else {
    for (Index x = 0; x < pixels; ++x) std::fill_n(to + x * I, I, scale * R(mask[x]));
  }
}

// An image times a mask.
template <class S>
struct Weighted {
  using Stores = S;
  static constexpr bool direct = false;
  const S *image, *mask;
  Index P, H, W, I;
  FN_BODY void fill(Index plane, Index y, S* to) const {
    mask_row(mask + (plane / P * H + y) * W, W, I, to);
    const S* const x = image + (plane * H + y) * W * I;
#pragma omp simd
    for (Index i = 0; i < W * I; ++i) to[i] *= x[i];
  }
};

// ---- a step to a coarser level

template <class Source, class R>
struct Coarsen {
  Source source;
  Step step;
  Index in_h, in_w, out_h, out_w, I;
  R scale;
  R* out;
  Index bands = (out_h + kBand - 1) / kBand;

  template <Simd>
  FN_BODY void run(Index from, Index to) const {
    using S = typename Source::Stores;
    // Bytes and their differences are added up exactly.
    constexpr bool integers = !std::is_floating_point_v<S>;
    using T = std::conditional_t<integers, std::int16_t, R>;
    const Index n = in_w * I, m = out_w * I;
    const Ends<R> ends(step, in_w, out_w);
    Buffers<R> row(in_w, I, 3);
    Buffers<T> column(in_w, I, 1);
    Buffers<S> ring(Source::direct ? 0 : in_w, I, kSlots);
    const bool is_down = step == Step::down;
    const float to_integers = is_down ? 16.0f : 8.0f;
    const R along = scale * R(is_down ? 1 : 2) * R(integers ? 1 / to_integers : 1);
    const R at_ends = scale * R(integers ? 1 / to_integers : 1);
    for (Index unit = from; unit < to; ++unit) {
      const Index plane = unit / bands, first = unit % bands * kBand, last = std::min(first + kBand, out_h);
      Index held[kSlots];
      std::fill_n(held, kSlots, Index(-1));
      for (Index y = first; y < last; ++y) {
        const AxisTaps taps = axis_taps(step, y, in_h, out_h);
        const S* rows[AxisTaps::kMost];
        for (int k = 0; k < taps.count; ++k) {
          const Index in = taps.first + k;
          if constexpr (Source::direct) {
            rows[k] = source.row(plane, in);
          } else {
            const int slot = int(in % kSlots);
            if (held[slot] != in) source.fill(plane, in, ring.row(slot));
            held[slot] = in;
            rows[k] = ring.row(slot);
          }
        }
        combine(rows, taps, integers ? to_integers : 1.0f, n, column.row(0));
        coarsen_row(static_cast<const T*>(column.row(0)), I, out_w, along, ends, at_ends, row.row(0), row.row(1),
                    row.row(2), out + (plane * out_h + y) * m);
      }
    }
  }
};

template <class Source, class R>
void coarsen(Source source, Step step, Index planes, Index in_h, Index in_w, Index I, R scale, R* out) {
  const Coarsen<Source, R> job{source, step, in_h, in_w, coarser(in_h), coarser(in_w), I, scale, out};
  share_out(job, planes * job.bands, kBand * in_w * I);
}

// ---- a step to a finer level

// Rows of the finer level, one at a time, of any plane.
template <class R>
class Expander {
 public:
  FN_BODY Expander(Step step, Index in_h, Index in_w, Index out_h, Index out_w, Index I)
      : step_(step), in_h_(in_h), in_w_(in_w), out_h_(out_h), I_(I), ends_(step, in_w, out_w), row_(in_w, I, 3) {}

  // to: a row of Buffers.
  FN_BODY void row(const R* plane, Index y, R* to) {
    const Index n = in_w_ * I_;
    const AxisTaps taps = axis_taps(step_, y, in_h_, out_h_);
    const R* rows[AxisTaps::kMost];
    for (int k = 0; k < taps.count; ++k) rows[k] = plane + (taps.first + k) * n;
    combine(rows, taps, 1.0f, n, row_.row(0));
    const R scale = step_ == Step::up ? R(1) : R(0.5);
    expand_row(static_cast<const R*>(row_.row(0)), I_, in_w_, scale, ends_, row_.row(1), row_.row(2), to);
  }

 private:
  Step step_;
  Index in_h_, in_w_, out_h_, I_;
  Ends<R> ends_;
  Buffers<R> row_;
};

template <class R>
struct Expand {
  const PyramidStep& how;
  Index bands = (how.out_h + kBand - 1) / kBand;

  template <Simd>
  FN_BODY void run(Index from, Index to) const {
    Expander<R> expander(how.step, how.in_h, how.in_w, how.out_h, how.out_w, 1);
    Buffers<R> row(how.out_w, 1, 1);
    for (Index unit = from; unit < to; ++unit) {
      const Index plane = unit / bands, first = unit % bands * kBand, last = std::min(first + kBand, how.out_h);
      const R* const in = static_cast<const R*>(how.in) + plane * how.in_h * how.in_w;
      for (Index y = first; y < last; ++y) {
        expander.row(in, y, row.row(0));
        std::memcpy(static_cast<R*>(how.out) + (plane * how.out_h + y) * how.out_w, row.row(0),
                    std::size_t(how.out_w) * sizeof(R));
      }
    }
  }
};

template <class R>
void step_as(const PyramidStep& how) {
  if (coarsens(how.step)) {
    const Stored<R> source{static_cast<const R*>(how.in), how.in_h * how.in_w, how.in_w};
    coarsen(source, how.step, how.planes, how.in_h, how.in_w, Index(1), R(1), static_cast<R*>(how.out));
  } else {
    const Expand<R> job{how};
    share_out(job, how.planes * job.bands, kBand * how.out_w);
  }
}

// ---- the levels of a multi-band blend

template <class R>
struct Pyramid {
  Layout shape;
  Parts parts;
  R* scratch;

  Level level(int l) const { return level_of(shape, parts, l); }
  // Image k of level l >= 1, and mask k.
  R* image(int l, int k) const { return scratch + level(l).at + k * level(l).numel; }
  R* mask(int l, int k) const { return image(l, parts.images) + k * level(l).mask_numel; }
};

// Levels 1 ... levels of the difference (image 0) and of the mask (mask 0).
template <class S, class R>
void build(const Multiband& how, const Pyramid<R>& p, bool image, bool mask) {
  const Layout& s = how.shape;
  const S* const m = static_cast<const S*>(how.mask);
  for (int l = 0; l < how.levels; ++l) {
    const Level level = p.level(l);
    const Index n = level.w * s.I, planes = s.B * s.P;
    if (image && l == 0) {
      const Difference<S> source{static_cast<const S*>(how.foreground), static_cast<const S*>(how.background),
                                 s.plane(), n};
      coarsen(source, Step::down, planes, level.h, level.w, s.I, R(1), p.image(1, 0));
    } else if (image) {
      const Stored<R> source{p.image(l, 0), level.h * n, n};
      coarsen(source, Step::down, planes, level.h, level.w, s.I, R(1), p.image(l + 1, 0));
    }
    if (mask && l == 0) {
      const R scale = how.dtype == Dtype::uint8 ? R(1) / R(255) : R(1);
      coarsen(Stored<S>{m, s.H * s.W, s.W}, Step::down, s.B, level.h, level.w, Index(1), scale, p.mask(1, 0));
    } else if (mask) {
      const Stored<R> source{p.mask(l, 0), level.h * level.w, level.w};
      coarsen(source, Step::down, s.B, level.h, level.w, Index(1), R(1), p.mask(l + 1, 0));
    }
  }
}

// R_l of all planes, from D_l, M_l, D_l+1 and R_l+1; at level 0 added to the background.
template <class S, class R, bool finest>
struct Collapse {
  Layout shape;  // its H, W are the level's
  bool coarsest;
  const S *background, *foreground;  // the images, or null and D_l
  const S* mask;
  const R *coarse_image, *coarse_sum;
  S* out;
  Index bands = (shape.H + kBand - 1) / kBand;

  template <Simd>
  FN_BODY void run(Index from, Index to) const {
    const Index n = shape.row(), h = coarser(shape.H), w = coarser(shape.W), coarse_plane = h * w * shape.I;
    Expander<R> expander(Step::up, h, w, shape.H, shape.W, shape.I);
    Buffers<R> rows(shape.W, shape.I, 4);
    R *const m = rows.row(0), *const up_image = rows.row(1), *const up_sum = rows.row(2), *const made = rows.row(3);
    for (Index unit = from; unit < to; ++unit) {
      const Index b = unit / bands, first = unit % bands * kBand, last = std::min(first + kBand, shape.H);
      for (Index y = first; y < last; ++y) {
        mask_row(mask + (b * shape.H + y) * shape.W, shape.W, shape.I, m);
        for (Index plane = b * shape.P; plane < (b + 1) * shape.P; ++plane) {
          if (!coarsest) {
            expander.row(coarse_image + plane * coarse_plane, y, up_image);
            expander.row(coarse_sum + plane * coarse_plane, y, up_sum);
          }
          const Index at = plane * shape.plane() + y * n;
          const S *const f = foreground + at, *const g = finest ? background + at : nullptr;
          if constexpr (std::is_same_v<S, std::uint8_t>) {
#pragma omp simd
            for (Index i = 0; i < n; ++i)
              made[i] = R(g[i]) + (m[i] * (R(std::int32_t(f[i]) - std::int32_t(g[i])) - up_image[i]) + up_sum[i]);
            store_row(static_cast<const R*>(made), n, out + at);
          } else if constexpr (finest) {
            S* const to_row = out + at;
#pragma omp simd
            for (Index i = 0; i < n; ++i) to_row[i] = g[i] + (m[i] * ((f[i] - g[i]) - up_image[i]) + up_sum[i]);
          } else {
            S* const to_row = out + at;
#pragma omp simd
            for (Index i = 0; i < n; ++i) to_row[i] = m[i] * (f[i] - up_image[i]) + up_sum[i];
          }
        }
      }
    }
  }
};

template <class S, class R, bool finest>
void collapse(const Collapse<S, R, finest>& job) {
  share_out(job, job.shape.B * job.bands, kBand * job.shape.row() * job.shape.P);
}

template <class S>
void multiband_as(const Multiband& how) {
  using R = Real<S>;
  const Pyramid<R> p{how.shape, kForwardParts, static_cast<R*>(how.scratch)};
  build<S>(how, p, true, true);
  for (int l = how.levels; l >= 0; --l) {
    const bool coarsest = l == how.levels;
    const R *const image = coarsest ? nullptr : p.image(l + 1, 0), *const sum = coarsest ? nullptr : p.image(l + 1, 1);
    Layout shape = how.shape;
    if (l == 0) {
      collapse(Collapse<S, R, true>{shape, coarsest, static_cast<const S*>(how.background),
                                    static_cast<const S*>(how.foreground), static_cast<const S*>(how.mask), image, sum,
                                    static_cast<S*>(how.out)});
    } else {
      shape.H = p.level(l).h;
      shape.W = p.level(l).w;
      collapse(Collapse<R, R, false>{shape, coarsest, nullptr, p.image(l, 0), p.mask(l, 0), image, sum, p.image(l, 1)});
    }
  }
}

// ---- backward. With r_l the gradient by R_l (r_0 is the output's) and d_l that by D_l:
//   r_l+1 = up' r_l, q_l+1 = up' (M_l r_l), d_l = M_l r_l - q_l + down' d_l+1, q_0 = 0,
//   by M_l: the sum over channels of (D_l - up D_l+1) r_l, + down' of that by M_l+1.

template <class R>
struct Finish {
  Layout shape;  // its H, W are the level's
  bool coarsest;
  const R* grad;                     // r_l
  const R* mask;                     // M_l
  R* by_image;                       // q_l comes in and d_l goes out; null if neither is wanted
  R* by_background;                  // at level 0, where q is 0
  const R *foreground, *background;  // of D_l: without a background that itself
  const R *coarse_image, *coarse_by_image, *coarse_by_mask;
  R* by_mask;  // null if it is not wanted
  bool finest, wants_image;
  Index bands = (shape.H + kBand - 1) / kBand;

  template <Simd>
  FN_BODY void run(Index from, Index to) const {
    const Index n = shape.row(), h = coarser(shape.H), w = coarser(shape.W), coarse_plane = h * w * shape.I;
    Expander<R> up(Step::up, h, w, shape.H, shape.W, shape.I);
    Expander<R> down(Step::down_transposed, h, w, shape.H, shape.W, shape.I);
    Expander<R> mask_down(Step::down_transposed, h, w, shape.H, shape.W, 1);
    Buffers<R> rows(shape.W, shape.I, 5);
    R *const m = rows.row(0), *const up_image = rows.row(1), *const from_coarse = rows.row(2), *const sum = rows.row(3),
             *const mask_sum = rows.row(4);
    for (Index unit = from; unit < to; ++unit) {
      const Index b = unit / bands, first = unit % bands * kBand, last = std::min(first + kBand, shape.H);
      for (Index y = first; y < last; ++y) {
        if (wants_image) mask_row(mask + (b * shape.H + y) * shape.W, shape.W, shape.I, m);
        std::fill_n(sum, n, R(0));
        for (Index plane = b * shape.P; plane < (b + 1) * shape.P; ++plane) {
          const Index at = plane * shape.plane() + y * n;
          const R* const g = grad + at;
          if (wants_image) {
            if (!coarsest) down.row(coarse_by_image + plane * coarse_plane, y, from_coarse);
            image_row(at, n, g, m, from_coarse);
          }
          if (by_mask != nullptr) {
            if (!coarsest) up.row(coarse_image + plane * coarse_plane, y, up_image);
            add_mask_row(at, n, g, up_image, sum);
          }
        }
        if (by_mask == nullptr) continue;
        R* const out = by_mask + (b * shape.H + y) * shape.W;
        if (!coarsest) mask_down.row(coarse_by_mask + b * h * w, y, mask_sum);
        for (Index x = 0; x < shape.W; ++x) {
          R total = mask_sum[x];
          for (Index c = 0; c < shape.I; ++c) total += sum[x * shape.I + c];
          out[x] = total;
        }
      }
    }
  }

  FN_BODY void image_row(Index at, Index n, const R* g, const R* m, const R* from_coarse) const {
    if (finest) {
      R *const f = by_image, *const b = by_background;
#pragma omp simd
      for (Index i = 0; i < n; ++i) {
        const R d = m[i] * g[i] + from_coarse[i];
        if (f != nullptr) f[at + i] = d;
        if (b != nullptr) b[at + i] = g[i] - d;
      }
    } else {
      R* const d = by_image + at;
#pragma omp simd
      for (Index i = 0; i < n; ++i) d[i] = m[i] * g[i] - d[i] + from_coarse[i];
    }
  }

  FN_BODY void add_mask_row(Index at, Index n, const R* g, const R* up_image, R* sum) const {
    const R* const f = foreground + at;
    if (background != nullptr) {
      const R* const b = background + at;
#pragma omp simd
      for (Index i = 0; i < n; ++i) sum[i] += ((f[i] - b[i]) - up_image[i]) * g[i];
    } else {
#pragma omp simd
      for (Index i = 0; i < n; ++i) sum[i] += (f[i] - up_image[i]) * g[i];
    }
  }
};

template <class R>
void backward_as(const MultibandBackward& how) {
  const Multiband& f = how.forward;
  const Pyramid<R> p{f.shape, kBackwardParts, static_cast<R*>(f.scratch)};
  const bool wants_mask = how.by_mask != nullptr;
  const bool wants_image = how.by_background != nullptr || how.by_foreground != nullptr;
  build<R>(f, p, wants_mask, wants_image);
  const Layout& s = f.shape;
  const auto level_shape = [&](int l) {
    Layout shape = s;
    shape.H = p.level(l).h;
    shape.W = p.level(l).w;
    return shape;
  };
  const auto grad = [&](int l) { return l == 0 ? static_cast<const R*>(how.grad) : p.image(l, 1); };
  const auto mask = [&](int l) { return l == 0 ? static_cast<const R*>(f.mask) : p.mask(l, 0); };
  for (int l = 0; l < f.levels; ++l) {
    const Layout at = level_shape(l);
    const Stored<R> r{grad(l), at.plane(), at.row()};
    coarsen(r, Step::up_transposed, s.B * s.P, at.H, at.W, s.I, R(1), p.image(l + 1, 1));
    if (!wants_image) continue;
    const Weighted<R> weighted{grad(l), mask(l), s.P, at.H, at.W, s.I};
    coarsen(weighted, Step::up_transposed, s.B * s.P, at.H, at.W, s.I, R(1), p.image(l + 1, 2));
  }
  for (int l = f.levels; l >= 0; --l) {
    const bool coarsest = l == f.levels, finest = l == 0;
    Finish<R> job{level_shape(l),
                  coarsest,
                  grad(l),
                  mask(l),
                  finest ? static_cast<R*>(how.by_foreground) : p.image(l, 2),
                  static_cast<R*>(how.by_background),
                  finest ? static_cast<const R*>(f.foreground) : p.image(l, 0),
                  finest ? static_cast<const R*>(f.background) : nullptr,
                  coarsest ? nullptr : p.image(l + 1, 0),
                  coarsest ? nullptr : p.image(l + 1, 2),
                  coarsest ? nullptr : p.mask(l + 1, 1),
                  !wants_mask ? nullptr
                  : finest    ? static_cast<R*>(how.by_mask)
                              : p.mask(l, 1),
                  finest,
                  wants_image};
    share_out(job, s.B * job.bands, 2 * kBand * job.shape.row() * s.P);
  }
}

}  // namespace

void pyramid_step_cpu(const PyramidStep& how) {
  if (how.dtype == Dtype::float64)
    step_as<double>(how);
  else
    step_as<float>(how);
}

void multiband_cpu(const Multiband& how) {
  if (how.dtype == Dtype::uint8)
    multiband_as<std::uint8_t>(how);
  else if (how.dtype == Dtype::float64)
    multiband_as<double>(how);
  else
    multiband_as<float>(how);
}

void multiband_backward_cpu(const MultibandBackward& how) {
  if (how.forward.dtype == Dtype::float64)
    backward_as<double>(how);
  else
    backward_as<float>(how);
}

}  // namespace fastnuggets::filter

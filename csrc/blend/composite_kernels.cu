// A block of threads takes a tile of an image and walks the objects that touch it in their order; each pixel is one
// thread's. Where the mask is blurred the block puts the tile's part of it, with what lies around, into shared memory
// and weighs along rows and then down columns, in the CPU's order. First one block lays out the objects: nothing of
// where they lie is known to the host.
//
// Backward: the objects are drawn again and what lies under each is kept; each pixel goes through its objects from the
// topmost down; the blur is transposed; then each pixel of an object gathers from the pixels of the image that read it,
// and one block an object sums for its matrix. Orders of sums are fixed, so nothing depends on a schedule.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "blend/composite_cuda.h"
#include "blend/composite_math.h"
#include "common/launch.cuh"

namespace fastnuggets::composite::cuda {
namespace {

constexpr int kTile = 32, kRows = 8, kThreads = kTile * kRows;

// An object laid out, and where its part of the scratch begins, in pixels within reach of those before.
struct Laid {
  Placed o;
  Box within;  // reach
  Index start;
};

__global__ void __launch_bounds__(kThreads, 1) lay_out(const __grid_constant__ Composite how, Laid* laid) {
  for (Index n = threadIdx.x; n < how.N; n += kThreads) {
    laid[n].o = placed(how, n);
    laid[n].within = reach(how, laid[n].o);
    if (how.area != nullptr) how.area[n] = 0;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  Index start = 0;
  for (Index n = 0; n < how.N; ++n) {
    laid[n].start = start;
    start += laid[n].within.area();
  }
}

// ---- a tile

struct Tile {
  Index b;
  Box box;  // of the image

  __device__ explicit Tile(const Composite& how) {
    const Index across = (how.W + kTile - 1) / kTile, down = (how.H + kTile - 1) / kTile;
    Index k = blockIdx.x;
    const Index column = k % across;
    k /= across;
    b = k / down;
    const Index y = k % down * kTile, x = column * kTile;
    box = {y, x, smaller(y + kTile, how.H), smaller(x + kTile, how.W)};
  }
};

dim3 tiles(const Composite& how) {
  return dim3(unsigned(how.B * ((how.H + kTile - 1) / kTile) * ((how.W + kTile - 1) / kTile)));
}

// Shared memory of a tile's blurred mask: the mask with what lies around, and what is left of that after the rows.
template <class R>
std::size_t blur_bytes(const Composite& how) {
  const int side = kTile + 2 * how.feather.radius;
  return how.feather.radius == 0 ? 0 : std::size_t(side) * (side + kTile) * sizeof(R);
}

// The mask at row i, column j of the object's box, which may be outside of it.
template <class S>
__device__ Real<S> mask_around(const Composite& how, const Placed& o, Index i, Index j) {
  const Index h = o.box.height(), w = o.box.width();
  if (how.feather.zero_edge) {
    if (i < 0 || i >= h || j < 0 || j >= w) return 0;
  } else {
    i = mirrored(i, h);
    j = mirrored(j, w);
  }
  return mask_at<S>(how, o, o.box.y0 + i, o.box.x0 + j);
}

// Of values a step apart, `at` the middle one.
template <class R>
__device__ R weighed(const Feather& feather, const R* at, int step) {
  R sum = at[0] * R(feather.taps[0]);
  for (int k = 1; k <= feather.radius; ++k) sum += (at[-k * step] + at[k * step]) * R(feather.taps[k]);
  return sum;
}

// The blurred mask of the part of the tile where the object is seen. Afterwards alpha(y, x) gives it.
template <class S>
class Blurred {
 public:
  using R = Real<S>;

  __device__ Blurred(const Composite& how, const Placed& o, const Box& part, R* shared)
      : part_(part), radius_(how.feather.radius), feather_(how.feather), along_(shared) {
    const int width = int(part.width()), height = int(part.height());
    const int wide = width + 2 * radius_, high = height + 2 * radius_;
    R* const padded = shared + (kTile + 2 * radius_) * kTile;
    for (int k = threadIdx.x; k < wide * high; k += kThreads) {
      const Index y = part.y0 - radius_ + k / wide, x = part.x0 - radius_ + k % wide;
      padded[k] = mask_around<S>(how, o, y - o.box.y0, x - o.box.x0);
    }
    __syncthreads();
    for (int k = threadIdx.x; k < width * high; k += kThreads)
      along_[k] = weighed(feather_, padded + k / width * wide + k % width + radius_, 1);
    __syncthreads();
  }
  __device__ R alpha(Index y, Index x) const {
    const int width = int(part_.width());
    return weighed(feather_, along_ + (int(y - part_.y0) + radius_) * width + int(x - part_.x0), width);
  }

 private:
  Box part_;
  int radius_;
  const Feather& feather_;
  R* along_;
};

// What the backward pass keeps of an object's pixels within reach: [pixels] and [pixels, C].
template <class S>
struct Kept {
  Real<S>* alpha;
  S* under;
};

// Draws the objects in their order. `kept` is for the backward pass.
template <class S, bool keeps>
__global__ void __launch_bounds__(kThreads, std::is_same_v<S, double> ? 1 : 2)
    draw(const __grid_constant__ Composite how, const Laid* laid, const Kept<S> kept) {
  using R = Real<S>;
  FN_DYNAMIC_SHARED(R, shared);
  const Tile tile(how);
  const S *const background = static_cast<const S*>(how.background), *const pixels = static_cast<const S*>(how.pixels);
  S* const image = static_cast<S*>(how.image);
  const Index x = tile.box.x0 + threadIdx.x % kTile, row = tile.box.y0 + threadIdx.x / kTile;
  if (x < tile.box.x1)
    for (Index y = row; y < tile.box.y1; y += kRows) {
      for (Index c = 0; c < how.C; ++c) {
        const Index k = place_in_image(how, tile.b, y, x, c);
        image[k] = background[k];
      }
      if (how.ids != nullptr) how.ids[(tile.b * how.H + y) * how.W + x] = -1;
    }
  for (Index n = begin_of(how, tile.b); n < begin_of(how, tile.b + 1); ++n) {
    const Placed o = laid[n].o;
    const Box part = o.seen.with(tile.box);
    if (part.empty()) continue;
    const bool is_blurred = how.feather.radius > 0;
    R* const along = shared;
    if (is_blurred) __syncthreads();  // the object before has been drawn
    const auto draw_with = [&](auto alpha_at) {
      for (Index first = tile.box.y0; first < tile.box.y1; first += kRows) {
        const Index y = first + threadIdx.x / kTile;
        const bool is_in = y >= part.y0 && y < part.y1 && x >= part.x0 && x < part.x1;
        bool is_labelled = false;
        if (is_in) {
          const R a = alpha_at(y, x);
          const Reading<R> reads = reading<R>(how, o, y, x, colour_clamped(how));
          const Index within =
              keeps ? laid[n].start + (y - laid[n].within.y0) * laid[n].within.width() + x - laid[n].within.x0 : 0;
          if (keeps) kept.alpha[within] = a;
          for (Index c = 0; c < how.C; ++c) {
            const Index k = place_in_image(how, tile.b, y, x, c);
            const R f = how.sampling == Sampling::shift && !how.feather.zero_edge
                            ? load(pixels[place_of(how, o, (y - o.top) * o.w + x - o.left, c)])
                            : colour_at<S>(how, o, reads, c);
            if (keeps) kept.under[within * how.C + c] = image[k];
            image[k] = stored<S>(mixed(how.mix, f, a, R(load(image[k]))));
          }
          if (how.ids != nullptr && mask_at<S>(how, o, y, x) >= R(0.5)) {
            how.ids[(tile.b * how.H + y) * how.W + x] = std::int32_t(n);
            is_labelled = true;
          }
        }
        if (how.ids != nullptr) {
          const int count = __syncthreads_count(is_labelled);
          if (threadIdx.x == 0 && count > 0)
            atomicAdd(reinterpret_cast<unsigned long long*>(how.area + n), static_cast<unsigned long long>(count));
        }
      }
    };
    if (is_blurred) {
      const Blurred<S> blurred(how, o, part, along);
      draw_with([&](Index py, Index px) { return blurred.alpha(py, px); });
    } else {
      draw_with([&](Index py, Index px) { return mask_at<S>(how, o, py, px); });
    }
  }
}

// ---- backward

// Of the pixels within reach of all objects: [pixels], and colours [pixels, C].
template <class R>
struct Derivatives {
  R *alpha, *colours;
  R *down, *mask;  // of a blur, transposed
};

__device__ Index place_within(const Laid& laid, Index y, Index x) {
  return laid.start + (y - laid.within.y0) * laid.within.width() + x - laid.within.x0;
}

// The objects of each pixel from the topmost down, a channel at a time.
template <class S>
__global__ void __launch_bounds__(kThreads) through(const __grid_constant__ CompositeBackward how, const Laid* laid,
                                                    const Kept<S> kept, const Derivatives<Real<S>> by) {
  using R = Real<S>;
  const Composite& f = how.forward;
  const Tile tile(f);
  const Index x = tile.box.x0 + threadIdx.x % kTile;
  if (x >= tile.box.x1) return;
  for (Index y = tile.box.y0 + threadIdx.x / kTile; y < tile.box.y1; y += kRows)
    for (Index c = 0; c < f.C; ++c) {
      const Index k = place_in_image(f, tile.b, y, x, c);
      R g = load(static_cast<const S*>(how.grad)[k]);
      for (Index n = begin_of(f, tile.b + 1) - 1; n >= begin_of(f, tile.b); --n) {
        const Box& seen = laid[n].o.seen;
        if (y < seen.y0 || y >= seen.y1 || x < seen.x0 || x >= seen.x1) continue;
        const Index within = place_within(laid[n], y, x);
        const Reading<R> reads = reading<R>(f, laid[n].o, y, x, colour_clamped(f));
        const R top = colour_at<S>(f, laid[n].o, reads, c);
        const Slopes<R> s = slopes(f.mix, top, kept.alpha[within], R(load(kept.under[within * f.C + c])));
        by.colours[within * f.C + c] = g * s.f;
        by.alpha[within] = g * s.a + (c > 0 ? by.alpha[within] : R(0));
        g *= s.u;
      }
      if (how.background != nullptr) static_cast<S*>(how.background)[k] = stored<S>(g);
    }
}

// The transpose of a blur along one axis: of row i of n, weighed over those in [from, end), and over the rows that are
// mirrored onto it from outside.
template <class R, class At>
__device__ R unweighed(const Feather& feather, Index i, Index n, Index from, Index end, At at) {
  const auto value = [&](Index k) { return k >= from && k < end ? at(k) : R(0); };
  const auto weigh = [&](Index middle) {
    R sum = value(middle) * R(feather.taps[0]);
    for (int k = 1; k <= feather.radius; ++k) sum += (value(middle - k) + value(middle + k)) * R(feather.taps[k]);
    return sum;
  };
  R sum = weigh(i);
  if (feather.zero_edge || (i > feather.radius && i < n - 1 - feather.radius && n > feather.radius)) return sum;
  for (Index d = 1; d <= feather.radius; ++d) {
    if (mirrored(-d, n) == i) sum += weigh(-d);
    if (mirrored(n - 1 + d, n) == i) sum += weigh(n - 1 + d);
  }
  return sum;
}

// A column of blocks an object; its pixels within reach are shared out.
template <class R, bool along>
__global__ void __launch_bounds__(kThreads, 4)
    unblur(const __grid_constant__ Composite how, const Laid* laid, const Derivatives<R> by) {
  const Laid& object = laid[blockIdx.x];
  const Box &box = object.o.box, &seen = object.o.seen;
  const Index width = object.within.width(), count = object.within.area();
  for (Index k = Index(blockIdx.y) * kThreads + threadIdx.x; k < count; k += Index(gridDim.y) * kThreads) {
    const Index y = object.within.y0 + k / width, x = object.within.x0 + k % width;
    if constexpr (along) {
      by.mask[object.start + k] = unweighed<R>(how.feather, x - box.x0, box.width(), seen.x0 - box.x0, seen.x1 - box.x0,
                                               [&](Index j) { return by.down[place_within(object, y, box.x0 + j)]; });
    } else if (x >= seen.x0 && x < seen.x1) {
      by.down[object.start + k] =
          unweighed<R>(how.feather, y - box.y0, box.height(), seen.y0 - box.y0, seen.y1 - box.y0,
                       [&](Index i) { return by.alpha[place_within(object, box.y0 + i, x)]; });
    }
  }
}

// The pixels of the image that may read pixel (i, j) of the object: all of `limit`, or fewer.
__device__ Box readers(const Composite& how, const Laid& object, Index n, Index i, Index j, bool clamped,
                       const Box& limit) {
  const Placed& o = object.o;
  const Index r = clamped ? how.feather.radius : 0;
  const bool at_edge = i == 0 || j == 0 || i == o.h - 1 || j == o.w - 1;
  if (how.sampling == Sampling::shift) {
    const Index y = o.top + i, x = o.left + j;
    return Box{y - (i == 0 ? r : 0), x - (j == 0 ? r : 0), y + 1 + (i == o.h - 1 ? r : 0),
               x + 1 + (j == o.w - 1 ? r : 0)}
        .with(limit);
  }
  if (r > 0 && at_edge) return limit;
  // What interpolation reads of a pixel is within one of it, as the outline of an object of one pixel.
  double moved[9];
  const double* const m = how.matrix + 9 * n;
  for (int k = 0; k < 3; ++k) {
    moved[3 * k] = m[3 * k];
    moved[3 * k + 1] = m[3 * k + 1];
    moved[3 * k + 2] = m[3 * k] * double(j) + m[3 * k + 1] * double(i) + m[3 * k + 2];
  }
  return outline(moved, 1, 1, limit).grown(1).with(limit);
}

template <class R>
__device__ R share_in(const Axis<R>& axis, Index i) {
  return (axis.low == i ? axis.share[0] : R(0)) + (axis.high == i ? axis.share[1] : R(0));
}

// Each value of each object's pixels, or of its mask: a thread sums what the pixels of the image that read it have for
// it. An object may be there more than once.
template <class S, bool colours>
__global__ void __launch_bounds__(kThreads, 2)
    gather(const __grid_constant__ CompositeBackward how, const Laid* laid, const Derivatives<Real<S>> by) {
  using R = Real<S>;
  const Composite& f = how.forward;
  const Index channels = colours ? f.C : 1;
  const Index at = Index(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= f.P * channels) return;
  const bool clamped = colours && colour_clamped(f);
  R sum = 0;
  for (Index n = 0; n < f.N; ++n) {
    const Laid& object = laid[n];
    const Index w = object.o.w, size = object.o.h * w, value = at - object.o.first * channels;
    if (value < 0 || value >= size * channels || object.o.seen.empty()) continue;
    const Index pixel = f.channels_last ? value / channels : value % size;
    const Index c = f.channels_last ? value % channels : value / size;
    const Index i = pixel / w, j = pixel % w;
    const Box box = readers(f, object, n, i, j, clamped, colours ? object.o.seen : object.within);
    for (Index y = box.y0; y < box.y1; ++y)
      for (Index x = box.x0; x < box.x1; ++x) {
        const Reading<R> r = reading<R>(f, object.o, y, x, clamped);
        const R share = share_in(r.y, i) * share_in(r.x, j);
        const Index k = place_within(object, y, x);
        if (share != 0) sum += share * (colours ? by.colours[k * channels + c] : by.mask[k]);
      }
  }
  static_cast<S*>(colours ? how.pixels : how.mask)[at] = stored<S>(sum);
}

// Adds to sums [9] what a reading of one value, with derivative g, says of the inverse matrix.
template <class R, class Value>
__device__ void add_reading(const Reading<R>& r, Index w, Index y, Index x, R g, Value value, double* sums) {
  R by_y = 0, by_x = 0;
  for (int corner = 0; corner < 4; ++corner) {
    const int i = corner / 2, j = corner % 2;
    const R slope_y = r.y.slope[i] * r.x.share[j], slope_x = r.y.share[i] * r.x.slope[j];
    if (slope_y == 0 && slope_x == 0) continue;
    const R v = value((i ? r.y.high : r.y.low) * w + (j ? r.x.high : r.x.low));
    by_y += slope_y * v * g;
    by_x += slope_x * v * g;
  }
  if (by_y != 0 || by_x != 0) add_to_inverse(r, y, x, double(by_y), double(by_x), sums);
}

// A block an object.
template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    by_matrix(const __grid_constant__ CompositeBackward how, const Laid* laid, const Derivatives<Real<S>> by) {
  using R = Real<S>;
  FN_SHARED(double[kThreads][9], all);
  const Composite& f = how.forward;
  const Laid& object = laid[blockIdx.x];
  const Placed& o = object.o;
  const S *const mask = static_cast<const S*>(f.mask) + o.first, *const pixels = static_cast<const S*>(f.pixels);
  double sums[9] = {};
  const Index width = object.within.width(), count = object.within.area();
  for (Index k = threadIdx.x; k < count; k += kThreads) {
    if (f.sampling != Sampling::bilinear) break;
    const Index y = object.within.y0 + k / width, x = object.within.x0 + k % width, at = object.start + k;
    add_reading(
        reading<R>(f, o, y, x, false), o.w, y, x, by.mask[at], [&](Index pixel) { return share_of(mask[pixel]); },
        sums);
    if (y < o.seen.y0 || y >= o.seen.y1 || x < o.seen.x0 || x >= o.seen.x1) continue;
    const Reading<R> r = reading<R>(f, o, y, x, colour_clamped(f));
    for (Index c = 0; c < f.C; ++c)
      add_reading(
          r, o.w, y, x, by.colours[at * f.C + c], [&](Index pixel) { return load(pixels[place_of(f, o, pixel, c)]); },
          sums);
  }
  for (int k = 0; k < 9; ++k) all[threadIdx.x][k] = sums[k];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half)
      for (int k = 0; k < 9; ++k) all[threadIdx.x][k] += all[threadIdx.x + half][k];
  }
  if (threadIdx.x > 0) return;
  double* const out = how.matrix + 9 * Index(blockIdx.x);
  if (o.seen.empty())
    for (int k = 0; k < 9; ++k) out[k] = 0;
  else
    through_inverse(o.inverse, all[0], out);
}

// ---- host

dim3 blocks(Index count) { return dim3(unsigned((count + kThreads - 1) / kThreads)); }

// More pixels than are within reach of all objects, for all that the host knows.
Index most_within(const Composite& how) {
  const Index r = how.feather.radius, images = how.N * (how.H + 2 * r) * (how.W + 2 * r);
  if (how.place == nullptr) return images;
  // h + w <= h w + 1 is how much an object's box can grow.
  const Index grown = r > 0 && how.feather.zero_edge ? 2 * r * (how.P + how.N) + 4 * r * r * how.N : 0;
  // Objects may share their pixels, so that P says little.
  return how.P == 0 ? 0 : std::min(images, std::max<Index>(1, how.N) * (how.P + grown));
}

// Consecutive parts of the scratch; without memory it counts.
class Scratch {
 public:
  explicit Scratch(void* data) : data_(static_cast<char*>(data)) {}
  template <class T>
  T* take(Index count) {
    constexpr std::size_t kAlign = 256;
    T* const part = reinterpret_cast<T*>(data_ + used_);
    used_ += (std::size_t(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  char* data_;
  std::size_t used_ = 0;
};

template <class S>
struct BackwardScratch {
  using R = Real<S>;
  Laid* laid;
  S* image;
  Kept<S> kept;
  Derivatives<R> by;

  BackwardScratch(const CompositeBackward& how, Scratch& scratch) {
    const Composite& f = how.forward;
    const Index within = most_within(f);
    laid = scratch.take<Laid>(f.N);
    image = scratch.take<S>(f.B * f.C * f.H * f.W);
    kept.alpha = scratch.take<R>(within);
    kept.under = scratch.take<S>(within * f.C);
    by.alpha = scratch.take<R>(within);
    by.colours = scratch.take<R>(within * f.C);
    const bool is_blurred = f.feather.radius > 0;
    by.down = scratch.take<R>(is_blurred ? within : 0);
    by.mask = is_blurred ? scratch.take<R>(within) : by.alpha;
  }
};

template <class S>
void backward_as(const CompositeBackward& how, void* memory, cudaStream_t stream) {
  using R = Real<S>;
  Scratch room(memory);
  const BackwardScratch<S> scratch(how, room);
  CompositeBackward with = how;
  with.forward.image = scratch.image;
  const Composite& f = with.forward;
  FN_LAUNCH(lay_out, dim3(1), dim3(kThreads), 0, stream, f, scratch.laid);
  FN_LAUNCH((draw<S, true>), tiles(f), dim3(kThreads), blur_bytes<R>(f), stream, f, scratch.laid, scratch.kept);
  FN_LAUNCH(through<S>, tiles(f), dim3(kThreads), 0, stream, with, scratch.laid, scratch.kept, scratch.by);
  if (f.feather.radius > 0 && (how.mask != nullptr || how.matrix != nullptr)) {
    constexpr int kBlocks = 32;  // of an object
    const dim3 grid(unsigned(f.N), kBlocks);
    FN_LAUNCH((unblur<R, false>), grid, dim3(kThreads), 0, stream, f, scratch.laid, scratch.by);
    FN_LAUNCH((unblur<R, true>), grid, dim3(kThreads), 0, stream, f, scratch.laid, scratch.by);
  }
  if (how.mask != nullptr)
    FN_LAUNCH((gather<S, false>), blocks(f.P), dim3(kThreads), 0, stream, with, scratch.laid, scratch.by);
  if (how.pixels != nullptr)
    FN_LAUNCH((gather<S, true>), blocks(f.P * f.C), dim3(kThreads), 0, stream, with, scratch.laid, scratch.by);
  if (how.matrix != nullptr)
    FN_LAUNCH(by_matrix<S>, dim3(unsigned(f.N)), dim3(kThreads), 0, stream, with, scratch.laid, scratch.by);
}

}  // namespace

std::size_t scratch_bytes(const Composite& how) {
  Scratch room(nullptr);
  room.take<Laid>(how.N);
  return room.used();
}

void composite(const Composite& how, void* scratch, cudaStream_t stream) {
  Laid* const laid = static_cast<Laid*>(scratch);
  FN_LAUNCH(lay_out, dim3(1), dim3(kThreads), 0, stream, how, laid);
  for_pixels(how.dtype, [&](auto type) {
    using S = decltype(type);
    FN_LAUNCH((draw<S, false>), tiles(how), dim3(kThreads), blur_bytes<Real<S>>(how), stream, how, laid, Kept<S>{});
  });
}

std::size_t scratch_bytes(const CompositeBackward& how) {
  Scratch room(nullptr);
  for_pixels(how.forward.dtype, [&](auto type) { BackwardScratch<decltype(type)>(how, room); });
  return room.used();
}

void composite_backward(const CompositeBackward& how, void* scratch, cudaStream_t stream) {
  for_pixels(how.forward.dtype, [&](auto type) {
    using S = decltype(type);
    if constexpr (!std::is_same_v<S, std::uint8_t>) backward_as<S>(how, scratch, stream);
  });
}

}  // namespace fastnuggets::composite::cuda

// A thread makes one number and gathers what it is made of: a few taps, which neighbouring threads read as well and
// find in the first cache. Nothing is shared and nothing depends on a schedule. A level of a blend is one launch, whose
// sizes the host knows. Without the second number of __launch_bounds__ ptxas would rather spill than lose a block.
#include <cstdint>
#include <type_traits>

#include "blend/filter_cuda.h"
#include "blend/filter_math.h"
#include "common/convert.cuh"
#include "common/launch.cuh"
#include "common/normal.h"

namespace fastnuggets::filter::cuda {
namespace {

constexpr int kLane = 32, kRows = 8, kThreads = kLane * kRows;  // a block takes pieces of so many rows at a time
constexpr Index kMostBlocks = 65535;                            // on an axis of the grid

template <class S>
using Real = typename Compute<S>::type;

template <class S>
__device__ Real<S> number(S x) {
  if constexpr (std::is_same_v<S, std::uint8_t>)
    return float(x);
  else
    return convert<Real<S>>(x);
}

__device__ std::uint8_t to_byte(float x) {
  const float whole = rintf(x);
  return std::uint8_t(whole < 0.0f ? 0.0f : whole > 255.0f ? 255.0f : whole);
}

template <class S>
__device__ S stored(Real<S> x) {
  if constexpr (std::is_same_v<S, std::uint8_t>)
    return to_byte(x);
  else
    return convert<S>(x);
}

// A number of [planes, H, W, I].
struct Place {
  Index plane, y, x, c;
  __device__ Index in(Index H, Index W, Index I) const { return ((plane * H + y) * W + x) * I + c; }
};

// The image that a plane belongs to.
__device__ Index image_of(const Place& at, const Layout& s) { return unsigned(at.plane) / unsigned(s.P); }

// The grid over so many numbers; rows and planes on axes of their own, so that nothing is divided in 64 bits.
dim3 blocks_for(Index planes, Index H, Index row) {
  const auto some = [](Index n) { return unsigned(n < kMostBlocks ? n : kMostBlocks); };
  return dim3(some((row + kLane - 1) / kLane), some((H + kRows - 1) / kRows), some(planes));
}

template <class Body>
__device__ void for_places(Index planes, Index H, Index W, Index I, Body body) {
  const Index lane = threadIdx.x % kLane, row = threadIdx.x / kLane, n = W * I;
  for (Index plane = blockIdx.z; plane < planes; plane += gridDim.z)
    for (Index y = blockIdx.y * Index(kRows) + row; y < H; y += gridDim.y * Index(kRows))
      for (Index e = blockIdx.x * Index(kLane) + lane; e < n; e += gridDim.x * Index(kLane))
        body(Place{plane, y, unsigned(e) / unsigned(I), unsigned(e) % unsigned(I)});
}

// ---- a few taps

// The sum of one number; a sum in the order of the taps, as on the CPU.
template <class S>
__device__ Real<S> forward_taps(const FilterTaps& how, const S* plane, const Place& at) {
  using R = Real<S>;
  const Layout& s = how.shape;
  const Taps& taps = how.taps;
  constexpr bool bytes = std::is_same_v<S, std::uint8_t>;
  const bool products = bytes && how.rounding == Rounding::truncate;
  R sum = 0, part = 0;
  for (int k = 0; k < taps.count; ++k) {
    const Tap& tap = taps.tap[k];
    Index y = at.y + tap.dy, x = at.x + tap.dx;
    const bool out = y < 0 || y >= s.H || x < 0 || x >= s.W;
    R value = R(how.value);
    if (!out || how.border != Border::constant) {
      y = inside(how.border, y, s.H);
      x = inside(how.border, x, s.W);
      value = number(plane[(y * s.W + x) * s.I + at.c]);
    }
    if constexpr (bytes) {
      if (!tap.joins) {
        sum += part;
        part = 0;
      }
      part += exact::mul(products ? float(tap.weight) / float(taps.divisor) : float(tap.weight), value);
    } else {
      sum += R(tap.weight) * value;
    }
  }
  return bytes ? sum + part : sum / R(taps.divisor);
}

// The places along an axis that sample p is found at, p first: f(e).
template <class Body>
__device__ void for_images(Border border, Index p, Index n, Index reach, Body body) {
  body(p);
  if (border == Border::constant || (p > reach && p < n - 1 - reach)) return;
  for (Index e = next_image(border, p, n, reach, -reach - 1); e < n + reach; e = next_image(border, p, n, reach, e))
    body(e);
}

template <class S>
__device__ Real<S> transposed_taps(const FilterTaps& how, const S* plane, const Place& at) {
  using R = Real<S>;
  const Layout& s = how.shape;
  const Taps& taps = how.taps;
  R sum = 0;
  for_images(how.border, at.y, s.H, taps.radius_y, [&](Index ey) {
    for_images(how.border, at.x, s.W, taps.radius_x, [&](Index ex) {
      for (int k = 0; k < taps.count; ++k) {
        const Index y = ey - taps.tap[k].dy, x = ex - taps.tap[k].dx;
        if (y < 0 || y >= s.H || x < 0 || x >= s.W) continue;
        sum += R(taps.tap[k].weight) * number(plane[(y * s.W + x) * s.I + at.c]);
      }
    });
  });
  return sum / R(taps.divisor);
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) taps_kernel(const __grid_constant__ FilterTaps how) {
  const Layout& s = how.shape;
  const S* const image = static_cast<const S*>(how.image);
  S* const out = static_cast<S*>(how.out);
  for_places(s.B * s.P, s.H, s.W, s.I, [&](const Place& at) {
    const Index i = at.in(s.H, s.W, s.I);
    const S* const plane = image + at.plane * s.plane();
    if constexpr (std::is_same_v<S, std::uint8_t>) {
      const float sum = forward_taps(how, plane, at);
      if (how.rounding == Rounding::truncate)
        out[i] = std::uint8_t(sum < 0.0f ? 0.0f : sum > 255.0f ? 255.0f : sum);
      else
        out[i] = to_byte(sum / float(how.taps.divisor));
    } else {
      out[i] = stored<S>(how.transposed ? transposed_taps(how, plane, at) : forward_taps(how, plane, at));
    }
  });
}

// ---- steps of a pyramid

// The sum of taps down and along of `load(y, x)`. Unrolled, so that the weights stay in registers: 5 taps to a coarser
// level, 3 to a finer one.
template <class R, int most, class Load>
__device__ R gathered(const AxisTaps& down, const AxisTaps& along, Load load) {
  R sum = 0;
#pragma unroll
  for (int j = 0; j < most; ++j) {
    if (j >= down.count) break;
    R row = 0;
#pragma unroll
    for (int k = 0; k < most; ++k) {
      if (k < along.count) row += R(along.weight[k]) * load(down.first + j, along.first + k);
    }
    sum += R(down.weight[j]) * row;
  }
  return sum;
}

template <class R>
__global__ void __launch_bounds__(kThreads, 1) step_kernel(const __grid_constant__ PyramidStep how) {
  for_places(how.planes, how.out_h, how.out_w, 1, [&](const Place& at) {
    const R* const plane = static_cast<const R*>(how.in) + at.plane * how.in_h * how.in_w;
    static_cast<R*>(how.out)[at.in(how.out_h, how.out_w, 1)] =
        gathered<R, 5>(axis_taps(how.step, at.y, how.in_h, how.out_h), axis_taps(how.step, at.x, how.in_w, how.out_w),
                       [&](Index y, Index x) { return plane[y * how.in_w + x]; });
  });
}

// ---- the levels of a multi-band blend; the formulas are those of filter.h and filter_pyramid_cpu.cpp

// One level: where its numbers are, and those of the next, coarser one.
template <class S>
struct LevelArgs {
  Layout shape;  // its H, W are the level's
  bool coarsest;
  const S *first, *second;  // the level's D, or, if `second` is there, first - second
  const S* mask;
  Real<S> mask_scale;
  Real<S>*coarse_image, *coarse_mask;  // written on the way down, read on the way up
  const Real<S>* coarse_sum;
  void* out;  // S with `second`, the type that is computed in without
};

template <class S>
__device__ Real<S> difference(const LevelArgs<S>& how, Index i) {
  const Real<S> x = number(how.first[i]);
  return how.second == nullptr ? x : x - number(how.second[i]);
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) down_kernel(const __grid_constant__ LevelArgs<S> how) {
  using R = Real<S>;
  const Layout& s = how.shape;
  const Index h = coarser(s.H), w = coarser(s.W);
  for_places(s.B * s.P, h, w, s.I, [&](const Place& at) {
    const AxisTaps down = axis_taps(Step::down, at.y, s.H, h), along = axis_taps(Step::down, at.x, s.W, w);
    const Index from = at.plane * s.plane() + at.c;
    how.coarse_image[at.in(h, w, s.I)] =
        gathered<R, 5>(down, along, [&](Index y, Index x) { return difference(how, from + (y * s.W + x) * s.I); });
  });
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) mask_down_kernel(const __grid_constant__ LevelArgs<S> how) {
  using R = Real<S>;
  const Layout& s = how.shape;
  const Index h = coarser(s.H), w = coarser(s.W);
  for_places(s.B, h, w, 1, [&](const Place& at) {
    const AxisTaps down = axis_taps(Step::down, at.y, s.H, h), along = axis_taps(Step::down, at.x, s.W, w);
    const S* const mask = how.mask + at.plane * s.H * s.W;
    how.coarse_mask[at.in(h, w, 1)] =
        how.mask_scale * gathered<R, 5>(down, along, [&](Index y, Index x) { return number(mask[y * s.W + x]); });
  });
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) collapse_kernel(const __grid_constant__ LevelArgs<S> how) {
  using R = Real<S>;
  const Layout& s = how.shape;
  const Index h = coarser(s.H), w = coarser(s.W);
  for_places(s.B * s.P, s.H, s.W, s.I, [&](const Place& at) {
    const Index i = at.in(s.H, s.W, s.I);
    R up_image = 0, up_sum = 0;
    if (!how.coarsest) {
      const AxisTaps down = axis_taps(Step::up, at.y, h, s.H), along = axis_taps(Step::up, at.x, w, s.W);
      const Index from = at.plane * h * w * s.I + at.c;
      up_image =
          gathered<R, 3>(down, along, [&](Index y, Index x) { return how.coarse_image[from + (y * w + x) * s.I]; });
      up_sum = gathered<R, 3>(down, along, [&](Index y, Index x) { return how.coarse_sum[from + (y * w + x) * s.I]; });
    }
    const R m = how.mask_scale * number(how.mask[(image_of(at, s) * s.H + at.y) * s.W + at.x]);
    const R sum = m * (difference(how, i) - up_image) + up_sum;
    if (how.second == nullptr)
      static_cast<R*>(how.out)[i] = sum;
    else
      static_cast<S*>(how.out)[i] = stored<S>(number(how.second[i]) + sum);
  });
}

// Backward, to a coarser level: r and q.
template <class R>
struct GradDown {
  Layout shape;
  const R *grad, *mask;
  R *coarse_grad, *coarse_weighted;  // the second may be null
};

template <class R>
__global__ void __launch_bounds__(kThreads, 1) grad_down_kernel(const __grid_constant__ GradDown<R> how) {
  const Layout& s = how.shape;
  const Index h = coarser(s.H), w = coarser(s.W);
  for_places(s.B * s.P, h, w, s.I, [&](const Place& at) {
    const Index i = at.in(h, w, s.I);
    const AxisTaps down = axis_taps(Step::up_transposed, at.y, s.H, h);
    const AxisTaps along = axis_taps(Step::up_transposed, at.x, s.W, w);
    const R* const plane = how.grad + at.plane * s.plane() + at.c;
    const R* const mask = how.mask + image_of(at, s) * s.H * s.W;
    how.coarse_grad[i] = gathered<R, 5>(down, along, [&](Index y, Index x) { return plane[(y * s.W + x) * s.I]; });
    if (how.coarse_weighted != nullptr)
      how.coarse_weighted[i] =
          gathered<R, 5>(down, along, [&](Index y, Index x) { return mask[y * s.W + x] * plane[(y * s.W + x) * s.I]; });
  });
}

// Backward, to a finer level.
template <class R>
struct Finish {
  Layout shape;
  bool coarsest, finest, wants_image;
  const R *grad, *mask;
  R *by_image, *by_background;
  const R *foreground, *background;
  const R *coarse_image, *coarse_by_image, *coarse_by_mask;
  R* by_mask;
};

template <class R>
__device__ R expanded(const R* coarse, Step step, const Place& at, const Layout& s, Index I) {
  const Index h = coarser(s.H), w = coarser(s.W);
  const R* const plane = coarse + at.plane * h * w * I + at.c;
  return gathered<R, 3>(axis_taps(step, at.y, h, s.H), axis_taps(step, at.x, w, s.W),
                        [&](Index y, Index x) { return plane[(y * w + x) * I]; });
}

template <class R>
__global__ void __launch_bounds__(kThreads, 1) finish_image_kernel(const __grid_constant__ Finish<R> how) {
  const Layout& s = how.shape;
  for_places(s.B * s.P, s.H, s.W, s.I, [&](const Place& at) {
    const Index i = at.in(s.H, s.W, s.I);
    const R g = how.grad[i];
    R d = how.mask[(image_of(at, s) * s.H + at.y) * s.W + at.x] * g;
    if (!how.finest) d -= how.by_image[i];
    if (!how.coarsest) d += expanded(how.coarse_by_image, Step::down_transposed, at, s, s.I);
    if (how.by_image != nullptr) how.by_image[i] = d;
    if (how.by_background != nullptr) how.by_background[i] = g - d;
  });
}

// A thread adds up the channels of a pixel.
template <class R>
__global__ void __launch_bounds__(kThreads, 1) finish_mask_kernel(const __grid_constant__ Finish<R> how) {
  const Layout& s = how.shape;
  for_places(s.B, s.H, s.W, 1, [&](Place at) {
    const Index b = at.plane, i = at.in(s.H, s.W, 1);
    R sum = how.coarsest ? R(0) : expanded(how.coarse_by_mask, Step::down_transposed, at, s, Index(1));
    for (Index p = 0; p < s.P; ++p)
      for (at.c = 0; at.c < s.I; ++at.c) {
        at.plane = b * s.P + p;
        const Index from = at.in(s.H, s.W, s.I);
        R band = how.foreground[from];
        if (how.background != nullptr) band -= how.background[from];
        if (!how.coarsest) band -= expanded(how.coarse_image, Step::up, at, s, s.I);
        sum += band * how.grad[from];
      }
    how.by_mask[i] = sum;
  });
}

// ---- the host's loops over levels

template <class R>
struct Pyramid {
  Layout shape;
  Parts parts;
  R* scratch;

  Layout level_shape(int l) const {
    const Level level = level_of(shape, parts, l);
    Layout found = shape;
    found.H = level.h;
    found.W = level.w;
    return found;
  }
  R* image(int l, int k) const {
    const Level level = level_of(shape, parts, l);
    return scratch + level.at + k * level.numel;
  }
  R* mask(int l, int k) const {
    const Level level = level_of(shape, parts, l);
    return image(l, parts.images) + k * level.mask_numel;
  }
};

dim3 blocks_for(const Layout& s) { return blocks_for(s.B * s.P, s.H, s.row()); }

template <class S>
void run_down(const LevelArgs<S>& how, cudaStream_t stream) {
  const Layout& s = how.shape;
  const Index h = coarser(s.H), w = coarser(s.W);
  if (how.coarse_image != nullptr)
    FN_LAUNCH(down_kernel<S>, blocks_for(s.B * s.P, h, w * s.I), dim3(kThreads), 0, stream, how);
  if (how.coarse_mask != nullptr) FN_LAUNCH(mask_down_kernel<S>, blocks_for(s.B, h, w), dim3(kThreads), 0, stream, how);
}

// Levels 1 ... levels of the difference and of the mask, as far as they are wanted.
template <class S>
void build(const Multiband& how, const Pyramid<Real<S>>& p, bool image, bool mask, cudaStream_t stream) {
  using R = Real<S>;
  for (int l = 0; l < how.levels; ++l) {
    R *const to_image = image ? p.image(l + 1, 0) : nullptr, *const to_mask = mask ? p.mask(l + 1, 0) : nullptr;
    if (l == 0) {
      const R scale = how.dtype == Dtype::uint8 ? R(1) / R(255) : R(1);
      run_down(
          LevelArgs<S>{how.shape, false, static_cast<const S*>(how.foreground), static_cast<const S*>(how.background),
                       static_cast<const S*>(how.mask), scale, to_image, to_mask, nullptr, nullptr},
          stream);
    } else {
      run_down(LevelArgs<R>{p.level_shape(l), false, image ? p.image(l, 0) : nullptr, nullptr,
                            mask ? p.mask(l, 0) : nullptr, R(1), to_image, to_mask, nullptr, nullptr},
               stream);
    }
  }
}

template <class S>
void multiband_as(const Multiband& how, cudaStream_t stream) {
  using R = Real<S>;
  const Pyramid<R> p{how.shape, kForwardParts, static_cast<R*>(how.scratch)};
  build<S>(how, p, true, true, stream);
  for (int l = how.levels; l >= 0; --l) {
    const bool coarsest = l == how.levels;
    R *const image = coarsest ? nullptr : p.image(l + 1, 0), *const sum = coarsest ? nullptr : p.image(l + 1, 1);
    if (l == 0) {
      const R scale = how.dtype == Dtype::uint8 ? R(1) / R(255) : R(1);
      const LevelArgs<S> args{how.shape,
                              coarsest,
                              static_cast<const S*>(how.foreground),
                              static_cast<const S*>(how.background),
                              static_cast<const S*>(how.mask),
                              scale,
                              image,
                              nullptr,
                              sum,
                              how.out};
      FN_LAUNCH(collapse_kernel<S>, blocks_for(args.shape), dim3(kThreads), 0, stream, args);
    } else {
      const LevelArgs<R> args{p.level_shape(l), coarsest, p.image(l, 0), nullptr, p.mask(l, 0), R(1), image,
                              nullptr,          sum,      p.image(l, 1)};
      FN_LAUNCH(collapse_kernel<R>, blocks_for(args.shape), dim3(kThreads), 0, stream, args);
    }
  }
}

template <class R>
void backward_as(const MultibandBackward& how, cudaStream_t stream) {
  const Multiband& f = how.forward;
  const Pyramid<R> p{f.shape, kBackwardParts, static_cast<R*>(f.scratch)};
  const bool wants_mask = how.by_mask != nullptr;
  const bool wants_image = how.by_background != nullptr || how.by_foreground != nullptr;
  build<R>(f, p, wants_mask, wants_image, stream);
  const auto grad = [&](int l) { return l == 0 ? static_cast<const R*>(how.grad) : p.image(l, 1); };
  const auto mask = [&](int l) { return l == 0 ? static_cast<const R*>(f.mask) : p.mask(l, 0); };
  for (int l = 0; l < f.levels; ++l) {
    const GradDown<R> args{p.level_shape(l), grad(l), mask(l), p.image(l + 1, 1),
                           wants_image ? p.image(l + 1, 2) : nullptr};
    FN_LAUNCH(grad_down_kernel<R>, blocks_for(p.level_shape(l + 1)), dim3(kThreads), 0, stream, args);
  }
  for (int l = f.levels; l >= 0; --l) {
    const bool coarsest = l == f.levels, finest = l == 0;
    const Finish<R> args{p.level_shape(l),
                         coarsest,
                         finest,
                         wants_image,
                         grad(l),
                         mask(l),
                         finest ? static_cast<R*>(how.by_foreground) : p.image(l, 2),
                         finest ? static_cast<R*>(how.by_background) : nullptr,
                         finest ? static_cast<const R*>(f.foreground) : p.image(l, 0),
                         finest ? static_cast<const R*>(f.background) : nullptr,
                         coarsest ? nullptr : p.image(l + 1, 0),
                         coarsest ? nullptr : p.image(l + 1, 2),
                         coarsest ? nullptr : p.mask(l + 1, 1),
                         !wants_mask ? nullptr
                         : finest    ? static_cast<R*>(how.by_mask)
                                     : p.mask(l, 1)};
    const Layout& s = args.shape;
    if (wants_image) FN_LAUNCH(finish_image_kernel<R>, blocks_for(s), dim3(kThreads), 0, stream, args);
    if (wants_mask) FN_LAUNCH(finish_mask_kernel<R>, blocks_for(s.B, s.H, s.W), dim3(kThreads), 0, stream, args);
  }
}

}  // namespace

void taps(const FilterTaps& how, cudaStream_t stream) {
  for_pixels(how.dtype, [&](auto of) {
    FN_LAUNCH(taps_kernel<decltype(of)>, blocks_for(how.shape), dim3(kThreads), 0, stream, how);
  });
}

void step(const PyramidStep& how, cudaStream_t stream) {
  const dim3 blocks = blocks_for(how.planes, how.out_h, how.out_w);
  if (how.dtype == Dtype::float64)
    FN_LAUNCH(step_kernel<double>, blocks, dim3(kThreads), 0, stream, how);
  else
    FN_LAUNCH(step_kernel<float>, blocks, dim3(kThreads), 0, stream, how);
}

void multiband(const Multiband& how, cudaStream_t stream) {
  if (how.dtype == Dtype::uint8)
    multiband_as<std::uint8_t>(how, stream);
  else if (how.dtype == Dtype::float64)
    multiband_as<double>(how, stream);
  else
    multiband_as<float>(how, stream);
}

void multiband_backward(const MultibandBackward& how, cudaStream_t stream) {
  if (how.forward.dtype == Dtype::float64)
    backward_as<double>(how, stream);
  else
    backward_as<float>(how, stream);
}

}  // namespace fastnuggets::filter::cuda

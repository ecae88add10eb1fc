// Filters of images: what the kernels of both ends are given.
//
// Images are dense and lie as [B, P, H, W, I]: P planes of rows whose pixels are I numbers. Channels first, P = C and
// I = 1; channels last, P = 1 and I = C.
#pragma once

#include <cstdint>

#include "common/storage.h"

namespace fastnuggets::filter {

using Index = std::int64_t;

struct Layout {
  Index B, P, H, W, I;
  FN_HD constexpr Index row() const { return W * I; }
  FN_HD constexpr Index plane() const { return H * W * I; }
  FN_HD constexpr Index channels() const { return P * I; }
  FN_HD constexpr Index numel() const { return B * P * plane(); }
};

// ---- a few taps

// What lies outside an image; the order is that of BORDERS in fastnuggets/ops/filters.py.
enum class Border : int {
  constant,
  reflect,    // dcb|abcd|cba
  replicate,  // aaa|abcd|ddd
};

struct Tap {
  std::int16_t dy, dx, weight;
  std::int16_t joins;  // 1: its product is added to that of the tap before, and both together to the sum
};

constexpr int kMostTaps = 128;  // 11 x 11 and some; they go to a kernel by value

struct Taps {
  int count;
  int radius_y, radius_x;  // largest |dy| and |dx|
  std::int32_t divisor;
  Tap tap[kMostTaps];
};

// How sums of bytes become bytes; floating images are not rounded.
enum class Rounding : int {
  nearest,   // of the exact quotient; ties to even
  truncate,  // of float32 products weight / divisor * x, each rounded, as is each addition, in the order of the taps,
             // whose weights are the same
};

// out[y, x] = sum_k weight_k image[y + dy_k, x + dx_k] / divisor, or the transpose of that as a matrix: the gradient.
// The transpose has no bytes; its border is the forward's, whose constant does not matter to it.
struct FilterTaps {
  Layout shape;
  const void* image;
  void* out;
  Dtype dtype;
  Border border;
  double value;  // of a constant border
  Rounding rounding;
  bool transposed;
  Taps taps;
};

// ---- pyramids (Burt, Adelson, "The Laplacian pyramid as a compact image code", IEEE Trans. Comm. 31, 1983)

// Between a fine grid of n samples and a coarse one of (n + 1) / 2, on each axis, as OpenCV's pyrDown and pyrUp:
// down: coarse j is 1 4 6 4 1 / 16 of fine 2j - 2 ... 2j + 2, reflected at the ends without repeating them.
// up: fine 2a is 1 6 1 / 8 of coarse a - 1, a, a + 1 and fine 2a + 1 is 4 4 / 8 of coarse a, a + 1; coarse -1 is coarse
// 1, and coarse n is coarse n - 1.
// The others are their transposes. The order is that of STEPS in fastnuggets/ops/filters.py.
enum class Step : int { down, up, down_transposed, up_transposed };
constexpr int kSteps = 4;

constexpr bool coarsens(Step step) { return step == Step::down || step == Step::up_transposed; }

// A step of so many planes; sizes of what comes in and goes out.
struct PyramidStep {
  Step step;
  Index planes, in_h, in_w, out_h, out_w;
  const void* in;
  void* out;
  Dtype dtype;
};

constexpr int kMostLevels = 30;

// With D = foreground - background, its Gaussian pyramid D_l and the mask's, M_l, l = 0 ... levels:
// R_levels = M D, R_l = M_l (D_l - up D_l+1) + up R_l+1, out = background + R_0.
// That is Burt and Adelson's blend, "A multiresolution spline with application to image mosaics", ACM Trans. Graphics
// 2, 1983: their Laplacian pyramid is linear, and the background's part of it adds up to the background.
struct Multiband {
  Layout shape;
  int levels;
  Dtype dtype;
  const void *background, *foreground;
  const void* mask;  // [B, H, W], of the same type; bytes are 255ths
  void* out;
  void* scratch;  // multiband_scratch() numbers of the type that is computed in
};

struct MultibandBackward {
  Multiband forward;  // its out is null
  const void* grad;
  void *by_background, *by_foreground, *by_mask;  // each may be null
};

}  // namespace fastnuggets::filter

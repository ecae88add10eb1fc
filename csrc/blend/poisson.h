// Poisson blending: what the kernels of both ends are given, and the grids they solve on.
//
// Letters: B images of [H, W] with C channels, N objects with P pixels in all; an image has at most one object.
//
// Domain. An object of [h, w] lies with its first pixel at (y, x) of its image; what lies outside the image is cut off.
// The domain is its pixels inside the image whose mask is at least a half (128 for uint8), or, soft, above 0. Of pixel
// p in the domain N_p are the neighbours inside the image, and for each of these
//   sum over q of N_p (f_p - f_q) = sum over q of N_p v_pq,   f_q = background_q for q outside the domain
// where v_pq is the guidance (poisson_math.h). Beyond the object's rectangle its colour goes on as that of its nearest
// pixel and its mask is 0. So the condition at the image's border is the natural one. Only a domain that is the
// whole image leaves a constant open: then the mean of f is that of the object.
//
// Unknown. h = f - object, 0 outside the domain: the matrix is the same for all channels, the right side
// (poisson_math.h) of `import` is not 0 only beside the domain's border, and float32 is enough.
//
// Levels. Level 0 is the part of the rectangle inside the image (or any smaller box around the domain), with the matrix
// above: the centre counts the neighbours inside the image, couplings inside the domain are -1. Point (I, J) of level
// l + 1 lies on point (2I, 2J) of level l, so n points become n / 2 + 1; it is active if any of the 3 x 3 points around
// (2I, 2J) is. Interpolation P is bilinear, restriction its transpose, the matrix P' A P of nine points, symmetric.
// Where all is interior that is one stencil a level; only points near the domain's border need their own. Points that
// are not active have u = 0, and 0 for the inverse of their centre.
//
// Solution. Full multigrid from the coarsest level with one V cycle a level, then V cycles, each one relaxation before
// and one after (red-black at level 0, four colours above), until the estimated error is within the tolerance.
#pragma once

#include <cstdint>

#include "common/storage.h"

namespace fastnuggets::poisson {

// The order is that of GUIDANCES in fastnuggets/ops/poisson.py.
enum class Guidance : int { import, mixed, average };
constexpr int kGuidances = 3;

constexpr int kTable = 6;           // columns of the table: image, y, x, h, w, first pixel
constexpr int kCoarsest = 4;        // both sides of the last level; there are at least two levels
constexpr int kCoarsestSweeps = 4;  // relaxations there, each in both orders of the colours
constexpr int kMaxLevels = 32;

struct Scene {
  const void* background;     // [B, C, H, W], or [B, H, W, C] if channels_last
  const void* pixels;         // [P * C], object after object, each [C, h, w], or [h, w, C] if channels_last
  const void* mask;           // [P]; 0 to 255 or 0 to 1
  const std::int64_t* table;  // [N, 6] int64
  // How images, objects and masks are stored: uint8 counts to 255 and is rounded and clipped; float32 and float64 count
  // to 1 and are not clipped. float64 is computed in float64, the rest in float32.
  Dtype dtype;
  bool channels_last;
  std::int64_t B, C, H, W, N, P;
  std::int64_t max_h, max_w;  // no object is larger, so that a launch needs no look at the table
  Guidance guidance;
  bool soft;
};

// Stop rule: the estimated largest error is at most `tolerance` / 255 of full scale, or max_cycles were done.
struct Effort {
  float tolerance;
  int max_cycles;
};

// image = background with the objects blended in; other pixels keep their bits.
struct Blend {
  Scene scene;
  Effort effort;
  void* image;  // like background, and at the start a copy of it
  float* info;  // [N] estimated largest error in grey levels (full scale / 255); NaN if anything is not finite or the
                // row of the table names no image or pixels
};

// Gradients, by one solution of the same system with `grad` for the right side. Here the error is relative: at most
// tolerance / 255 of the largest value.
struct BlendBackward {
  Scene scene;
  Effort effort;
  const void* grad;       // like background
  void* grad_background;  // like background, or null; at the start a copy of grad
  void* grad_pixels;      // [P * C] or null; at the start 0
  void* grad_mask;        // [P] or null; at the start 0; soft only
  float* info;            // [N] estimated largest error of the solution over its largest value, times 255
};

}  // namespace fastnuggets::poisson

// Objects of different sizes laid on backgrounds, one after the other: what both ends are given.
//
// Letters: B images of C channels and H rows of W pixels; N objects, object n of h rows of w pixels, P pixels in all.
// Objects ptr[b] .. ptr[b + 1] - 1 lie on image b, later ones on top. Channels come first, [B, C, H, W] and [C, h, w],
// or last, [B, H, W, C] and [h, w, C]; objects are packed without gaps between their rows.
//
// For each object in its order, at each pixel of its box:
//   image = mix(f, a, image),  a = mask, or the mask blurred inside the box;  f = the object's colour
// and the image is rounded to its type each time, as it would be between two calls.
#pragma once

#include <cstdint>

#include "common/storage.h"

namespace fastnuggets::composite {

using Index = std::int64_t;

// over: a f + (1 - a) u. difference: a |f - u| + (1 - a) u. Of premultiplied pixels a f is given instead of f.
enum class Mix : std::uint8_t { over, difference, over_premultiplied, difference_premultiplied };
constexpr int kMixes = 4;

// Between an object's pixels, where it is laid by a matrix.
enum class Sampling : std::uint8_t { shift, nearest, bilinear };

constexpr int kMaxRadius = 63;

struct Feather {
  int radius;                   // 0: the mask as it is
  bool zero_edge;               // the box grows by the radius, and the mask is 0 beyond the object; else it is mirrored
  double taps[kMaxRadius + 1];  // by distance from the middle
};

struct Composite {
  const void* background;
  void* image;           // like background
  const void* pixels;    // [P * C] of the same type
  const void* mask;      // [P] the same; opaque is 1, or 255 of uint8
  const Index* sizes;    // [N, 3] number of the first pixel, h, w
  const Index* ptr;      // [B + 1], or null: all on the one image, or one on each
  const Index* place;    // [N, 2] row and column of the first pixel, or null
  const double* matrix;  // [N, 3, 3] from an object's (x, y, 1) to the image's, pixel centres at whole numbers; or null
  std::int32_t* ids;     // [B, H, W] the topmost object whose unblurred mask is 1/2 or more, or -1; or null
  Index* area;           // [N] pixels of the image where the object's mask is 1/2 or more; null with ids
  Index B, C, H, W, N, P;
  Dtype dtype;  // uint8 or a floating type
  Mix mix;
  Sampling sampling;
  bool channels_last;
  Feather feather;
};

struct CompositeBackward {
  Composite forward;  // image, ids and area are null
  const void* grad;   // like image
  void* background;   // gradients, each null if it is not wanted
  void* pixels;
  void* mask;
  double* matrix;
};

}  // namespace fastnuggets::composite

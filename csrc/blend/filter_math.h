// The formulas of filter.h, once for both ends.
#pragma once

#include "blend/filter.h"
#include "common/host_device.h"

namespace fastnuggets::filter {

// ---- borders

// Where sample i of n is found, i at any distance: b a|a b c -> reflect gives c b|a b c.
FN_HD Index reflected(Index i, Index n) {
  if (n == 1) return 0;
  while (i < 0 || i >= n) i = i < 0 ? -i : 2 * (n - 1) - i;
  return i;
}

FN_HD Index inside(Border border, Index i, Index n) {
  if (i >= 0 && i < n) return i;
  if (border == Border::reflect) return reflected(i, n);
  return i < 0 ? 0 : n - 1;
}

// The next place outside [0, n) and within `reach` of it where sample `p` is found as well, beyond `after`; or reach +
// n if there is none. Start with -reach - 1.
FN_HD Index next_image(Border border, Index p, Index n, Index reach, Index after) {
  for (Index e = after + 1; e < n + reach; ++e) {
    if (e == 0) e = n;  // inside there is nothing but p itself
    if (e < n + reach && inside(border, e, n) == p) return e;
  }
  return n + reach;
}

// ---- one axis of a pyramid

// Sample `out` of a step is the sum of weight[k] times sample first + k of what comes in.
struct AxisTaps {
  static constexpr int kMost = 5;
  Index first;
  int count;
  float weight[kMost];  // of 16 or 8, so exact
};

FN_HD int binomial(Index k) { return k == 0 ? 6 : k == 1 || k == -1 ? 4 : k == 2 || k == -2 ? 1 : 0; }

// In 16ths: the weight of fine sample x in coarse sample j.
FN_HD int down_weight(Index j, Index x, Index fine) {
  const Index e = 2 * j;
  if (e >= 2 && e + 2 < fine) return binomial(x - e);
  int sum = 0;
  for (int k = -2; k <= 2; ++k) sum += reflected(e + k, fine) == x ? binomial(k) : 0;
  return sum;
}

// In 8ths: the weight of coarse sample j in fine sample x. Without the ends it is the same binomial.
FN_HD int up_weight(Index x, Index j, Index coarse) {
  int sum = binomial(x - 2 * j);
  if (x == 0 && j == (coarse > 1 ? 1 : 0)) sum += 1;             // for coarse -1
  if (j == coarse - 1 && x >= 2 * j) sum += x == 2 * j ? 1 : 4;  // for coarse n
  return sum;
}

FN_HD AxisTaps axis_taps(Step step, Index out, Index in_size, Index out_size) {
  const bool to_coarse = step == Step::down || step == Step::up_transposed;
  const bool is_down = step == Step::down || step == Step::down_transposed;
  const Index fine = to_coarse ? in_size : out_size, coarse = to_coarse ? out_size : in_size;
  Index first = to_coarse ? 2 * out - 2 : (out - 1) >> 1, last = to_coarse ? 2 * out + 2 : (out + 2) >> 1;
  first = first < 0 ? 0 : first;
  last = last < in_size ? last : in_size - 1;
  AxisTaps taps{first, int(last - first) + 1, {}};
  const float scale = is_down ? 0.0625f : 0.125f;
  for (int k = 0; k < AxisTaps::kMost; ++k) {
    const Index in = first + k, j = to_coarse ? out : in, x = to_coarse ? in : out;
    if (k < taps.count) taps.weight[k] = scale * float(is_down ? down_weight(j, x, fine) : up_weight(x, j, coarse));
  }
  return taps;
}

// ---- the levels of a multi-band blend

FN_HD constexpr Index coarser(Index n) { return (n + 1) / 2; }

// Level l's parts of the scratch, l = 1 ... levels, in numbers from its start: first `images` images of all channels,
// then `masks` masks.
struct Level {
  Index h, w;
  Index numel;       // of an image of all channels and the whole batch
  Index mask_numel;  // of a mask of the whole batch
  Index at;          // where the level begins
};

struct Parts {
  int images, masks;
};
constexpr Parts kForwardParts{2, 1};   // D, R; M
constexpr Parts kBackwardParts{3, 2};  // D, r, q; M, the gradient by M

// Level `level` of 0 ... levels; level 0 has no scratch.
constexpr Level level_of(const Layout& shape, Parts parts, int level) {
  Level found{shape.H, shape.W, shape.numel(), shape.B * shape.H * shape.W, 0};
  for (int l = 1; l <= level; ++l) {
    if (l > 1) found.at += parts.images * found.numel + parts.masks * found.mask_numel;
    found.h = coarser(found.h);
    found.w = coarser(found.w);
    found.mask_numel = shape.B * found.h * found.w;
    found.numel = found.mask_numel * shape.channels();
  }
  return found;
}

constexpr Index multiband_scratch(const Layout& shape, Parts parts, int levels) {
  if (levels == 0) return 0;
  const Level last = level_of(shape, parts, levels);
  return last.at + parts.images * last.numel + parts.masks * last.mask_numel;
}

}  // namespace fastnuggets::filter

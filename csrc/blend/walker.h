// Random walker segmentation: what the kernel is given.
//
// An image of [H, W] pixels, edges between neighbours with weights above 0. The probability that a walker from a pixel
// reaches a seed of label k first is 1 at seeds of k, 0 at those of others, and elsewhere the mean of the neighbours'
// by the weights: a system with one unknown a pixel, the same for all labels. It is solved by conjugate gradients, with
// a multigrid cycle on graphs for the preconditioner (walker_cpu.cpp).
//
// L. Grady, "Random Walks for Image Segmentation", IEEE TPAMI 28(11), 2006.
#pragma once

#include <cstdint>

namespace fastnuggets::walker {

struct Walk {
  const double* east;         // [H, W] weight of the edge to the pixel on the right; the last column is not read
  const double* south;        // [H, W] the same below
  const std::int64_t* seeds;  // [H, W] 1..labels, 0: unknown
  std::int64_t H, W;
  int labels;
  double tolerance;       // estimated largest error of a probability
  int max_steps;          // of conjugate gradients, for a label
  double* probabilities;  // [labels, H, W]
  double* error;          // [1] estimated; NaN if anything is not finite
};

}  // namespace fastnuggets::walker

// Atoms fitted to grids by least squares: what both ends are given.
//
// Letters: G grids of [D, H, W] voxels, each fitted on its own, M atoms in all. Lengths are in angstrom, positions in
// box coordinates: the box centre is the origin, the centre of voxel i on an axis of n voxels of edge h is (i -
// (n-1)/2) h. Per grid g: minimise over positions p and amplitudes A of its atoms
//   sum over voxels v of (grid_v - sum over atoms a of A_a k(|v - p_a|))^2,  k(r) = exp(-r^2 / 2 sigma^2) cos(2 pi
//   omega r)
// with k cut where its envelope falls below `cutoff`.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastnuggets::fit {

template <class T>  // float or double
struct Problems {
  const T* grid;            // [G, D, H, W]
  const T* sigma;           // [G] > 0
  const T* omega;           // [G] oscillations per angstrom
  const std::int64_t* ptr;  // [G + 1], ascending from 0 to M
  T* positions;             // [M, 3] in: where to start; out: where the fit ended
  T* amplitudes;            // [M] the same
  std::int64_t G;
  std::int64_t shape[3];  // D, H, W
  double spacing[3];
  double cutoff;
  int iterations;  // at most so many steps are tried

  FN_HD std::int64_t voxels() const { return shape[0] * shape[1] * shape[2]; }
};

}  // namespace fastnuggets::fit

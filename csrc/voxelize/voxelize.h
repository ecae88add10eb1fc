// Molecules as 3-D grids: what both ends are given.
//
// Letters: B molecules in a ragged batch, K poses of each, N atoms in all, C channels, G = B*K grids (grid g shows pose
// g % K of molecule g / K). An entry (n, c) is atom n in channel c: an atom has one, that of its channel index, or,
// when it has a feature for each channel, C of them.
// Lengths are in angstrom. Axis 0 (D) runs along x, axis 1 (H) along y, axis 2 (W) along z; the box centre is the
// origin, so the centre of voxel i on an axis of n voxels of edge h is at (i - (n-1)/2) h.
#pragma once

#include <cstdint>

namespace fastnuggets {

// The order is the public one of fastnuggets.ops.voxelize; Python passes the number.
enum class Density : int { nearest, trilinear, sphere, gaussian, wave, molgrid, molvoxel, pyuul, moleculekit };
enum class Combine : int { sum, max, set_union, magnitude };

// A value for every entry, seen as [N, C] and possibly expanded: strides may be 0.
template <class R>
struct PerEntry {
  const R* data;  // null: all zero
  std::int64_t atom_stride;
  std::int64_t channel_stride;
};

template <class R>  // float or double: the type that is computed in
struct Molecules {
  const R* coords;              // [N, 3], or [N, K, 3] if posed
  const std::int64_t* ptr;      // [B + 1], ascending from 0 to N
  const std::int64_t* channel;  // [N] the one channel of each atom, others than 0..C-1 are left out; null: all channels
  PerEntry<R> weight;           // [N, C]
  PerEntry<R> size;             // [N, C] sigma of gaussian and wave, radius of the rest; <= 0: no contribution
  PerEntry<R> omega;            // [N, C] wave: oscillations per angstrom
  // Pose: box position = rotation (coords - center) + translation. Null: identity or zero. Unused if posed.
  const R* center;       // [G, 3]
  const R* rotation;     // [G, 3, 3]
  const R* translation;  // [G, 3]
  bool posed;            // coords holds box positions already, one for each pose
  std::int64_t B, K, N, C;
};

// The direction of a derivative: what multiplies each input's differential. Null: zero.
template <class R>
struct Tangent {
  const R* coords;  // [N, K, 3]
  const R* weight;  // [N, C]
  const R* size;    // [N, C]
  const R* omega;   // [N, C]
};

struct Grid {
  std::int64_t shape[3];  // D, H, W
  double spacing[3];
  Density density;
  Combine combine;
  double cutoff;  // gaussian and wave may be dropped where their envelope is below this part of the peak

  std::int64_t voxels() const { return shape[0] * shape[1] * shape[2]; }
};

// A grid that is written again and again may come with `filled` [G, C, D, 2]: the first and last row of each plane that
// may differ from zero. The CPU then clears those alone, and leaves the rows it filled itself. (0, -1): none.

// What the backward adds up for each entry over the poses; null: not wanted. Where an atom has no entry it writes
// nothing.
template <class R>
struct Gradients {
  R* coords;  // [N, K, 3] with respect to box positions
  R* weight;  // [N, C]
  R* size;    // [N, C]
  R* omega;   // [N, C]
};

}  // namespace fastnuggets

// The formulas of Poisson blending, host and device, written once. T is float or double; V may be a vector of T.
//
// P. Perez, M. Gangnet, A. Blake, "Poisson Image Editing", SIGGRAPH 2003.
#pragma once

#include "blend/poisson.h"
#include "common/host_device.h"

// Before a loop of few rounds.
#if defined(__CUDA_ARCH__)
#define FN_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define FN_UNROLL
#else
#define FN_UNROLL _Pragma("GCC unroll 3")
#endif

namespace fastnuggets::poisson {

// ---- geometry

// The part of an object that lies inside its image: [ny, nx] pixels, the first at (y, x) of the image and (oy, ox) of
// the object.
struct Placed {
  std::int64_t image, y, x, oy, ox, h, w, first;
  int ny, nx;  // 0 if there is none
  bool legal;  // false if the table's row names no image, or pixels that are not there

  FN_HD std::int64_t object_pixel(int i, int j) const { return (oy + i) * w + ox + j; }
};

FN_HD Placed place(const Scene& s, std::int64_t n) {
  const std::int64_t* const row = s.table + n * kTable;
  Placed p{};
  p.image = row[0];
  p.h = row[3];
  p.w = row[4];
  p.first = row[5];
  p.legal = p.image >= 0 && p.image < s.B && p.h >= 0 && p.w >= 0 && p.h <= s.max_h && p.w <= s.max_w && p.first >= 0 &&
            p.first <= s.P - p.h * p.w;
  if (!p.legal) return p;
  const std::int64_t top = row[1] > 0 ? row[1] : 0, left = row[2] > 0 ? row[2] : 0;
  const std::int64_t bottom = row[1] + p.h < s.H ? row[1] + p.h : s.H, right = row[2] + p.w < s.W ? row[2] + p.w : s.W;
  if (bottom <= top || right <= left) return p;
  p.y = top;
  p.x = left;
  p.oy = top - row[1];
  p.ox = left - row[2];
  p.ny = int(bottom - top);
  p.nx = int(right - left);
  return p;
}

// Where channel c of a pixel is, and how far apart its rows and columns are.
struct Plane {
  std::int64_t start, row, column;
};
FN_HD Plane image_plane(const Scene& s, const Placed& p, std::int64_t c) {
  if (s.channels_last) return {((p.image * s.H + p.y) * s.W + p.x) * s.C + c, s.W * s.C, s.C};
  return {((p.image * s.C + c) * s.H + p.y) * s.W + p.x, s.W, 1};
}
FN_HD Plane object_plane(const Scene& s, const Placed& p, std::int64_t c) {
  if (s.channels_last) return {(p.first + p.object_pixel(0, 0)) * s.C + c, p.w * s.C, s.C};
  return {p.first * s.C + c * p.h * p.w + p.object_pixel(0, 0), p.w, 1};
}

// Whether a pixel of this mask is unknown.
FN_HD bool in_domain(std::uint8_t m, bool soft) { return soft ? m > 0 : m >= 128; }
template <class T>
FN_HD bool in_domain(T m, bool soft) {
  return soft ? m > T(0) : m >= T(0.5);
}
FN_HD float unit_mask(std::uint8_t m) { return float(m) * (1.0f / 255.0f); }
template <class T>
FN_HD T unit_mask(T m) {
  return m;
}

// ---- right side, forward and backward

template <class T>
FN_HD T magnitude(T x) {
  return x < T(0) ? -x : x;
}

// Whether the background's difference along an edge is the larger one. Ties go to the object: also those that are none
// only because the values, say 1/255, were rounded to float.
template <class T>
FN_HD bool background_wins(T fg, T bg) {
  constexpr T kTie = T(4e-6);  // a thousandth of a grey level of images up to 1
  return magnitude(bg) > magnitude(fg) + kTie;
}

// Guidance of an edge: the difference wanted along it, from the object's (fg) and the background's (bg).
template <class T>
FN_HD T guidance_of(Guidance guidance, T fg, T bg) {
  if (guidance == Guidance::mixed) return background_wins(fg, bg) ? bg : fg;
  return guidance == Guidance::average ? T(0.5) * (fg + bg) : fg;
}

// v_pq of fg = fg_p - fg_q and bg = bg_p - bg_q. Soft: weight = (m_p + m_q) / 2 of the guidance, the rest of bg;
// hard: weight is 1.
template <class T>
FN_HD T edge_guidance(Guidance guidance, T fg, T bg, T weight) {
  return bg + weight * (guidance_of(guidance, fg, bg) - bg);
}

// What edge pq adds to the right side of p, of h = f - fg. q is inside the image. `bare`: guidance is import and hard,
// so v_pq = fg and only the domain's border counts.
template <class T>
FN_HD T edge_right_side(Guidance guidance, bool bare, T fg_p, T fg_q, T bg_p, T bg_q, T weight, bool q_in_domain) {
  const T fg = fg_p - fg_q, border = q_in_domain ? T(0) : bg_q - fg_q;
  return bare ? border : border + (edge_guidance(guidance, fg, bg_p - bg_q, weight) - fg);
}

// Derivatives of v_pq. With solution s of the adjoint system (0 outside the domain) its cotangent is s_p - s_q.
template <class T>
struct EdgeSlopes {
  T by_fg, by_bg, by_weight;
};
template <class T>
FN_HD EdgeSlopes<T> edge_slopes(Guidance guidance, T fg, T bg, T weight) {
  T share = T(1);  // of fg in the guidance
  if (guidance == Guidance::mixed) share = background_wins(fg, bg) ? T(0) : T(1);
  if (guidance == Guidance::average) share = T(0.5);
  return {weight * share, T(1) - weight * share, guidance_of(guidance, fg, bg) - bg};
}

// ---- levels

FN_HD int coarse_size(int n) { return n / 2 + 1; }
FN_HD int count_levels(int ny, int nx) {
  int levels = 1;
  do {
    ny = coarse_size(ny);
    nx = coarse_size(nx);
    ++levels;
  } while (ny > kCoarsest || nx > kCoarsest);
  return levels;
}

// Row of a symmetric matrix of nine points: entries to itself and to the neighbours named.
template <class V>
struct Stencil {
  V centre, east, south, south_east, south_west;
};

// Entry of the matrix from the point at offset (i, j) to that at (i + di, j + dj), |di|, |dj| <= 1. `fine(i, j)` gives
// a Stencil, all 0 outside the level.
template <class Fine>
FN_HD auto entry(const Fine& fine, int i, int j, int di, int dj) {
  if (di == 0 && dj == 0) return fine(i, j).centre;
  if (di == 0) return dj > 0 ? fine(i, j).east : fine(i, j - 1).east;
  if (dj == 0) return di > 0 ? fine(i, j).south : fine(i - 1, j).south;
  if (di > 0) return dj > 0 ? fine(i, j).south_east : fine(i, j).south_west;
  return dj > 0 ? fine(i - 1, j + 1).south_west : fine(i - 1, j - 1).south_east;
}

// Entry of P' A P from the coarse point on fine offset (0, 0) to that on (2 down, 2 right).
template <class V, class Fine>
FN_HD V galerkin_entry(const Fine& fine, int down, int right) {
  constexpr float kW[3] = {0.5f, 1.0f, 0.5f};  // of the points beside the coarse one on an axis
  V sum{};
  FN_UNROLL
  for (int i = -1; i <= 1; ++i) FN_UNROLL
  for (int j = -1; j <= 1; ++j) FN_UNROLL
  for (int di = -1; di <= 1; ++di) FN_UNROLL
  for (int dj = -1; dj <= 1; ++dj) {
    const int k = i + di - 2 * down, l = j + dj - 2 * right;
    if (k < -1 || k > 1 || l < -1 || l > 1) continue;
    sum += (kW[i + 1] * kW[j + 1] * kW[k + 1] * kW[l + 1]) * V(entry(fine, i, j, di, dj));
  }
  return sum;
}
template <class V, class Fine>
FN_HD Stencil<V> galerkin(const Fine& fine) {
  return {galerkin_entry<V>(fine, 0, 0), galerkin_entry<V>(fine, 0, 1), galerkin_entry<V>(fine, 1, 0),
          galerkin_entry<V>(fine, 1, 1), galerkin_entry<V>(fine, 1, -1)};
}

// The stencil of a level where all around is interior.
template <class T>
FN_HD Stencil<T> interior_stencil(int level) {
  Stencil<T> s{T(4), T(-1), T(-1), T(0), T(0)};
  for (int l = 0; l < level; ++l) s = galerkin<T>([s](int, int) { return s; });
  return s;
}

// ---- solution

// Over-relaxation: u += factor * (relaxed - u). At level 0 only red points (i + j even) before restriction; black ones
// come after them, so that there the residual is 0. At other levels all points but those relaxed last, which are in odd
// rows and columns, for the same reason: the order is even rows before odd ones, in a row even columns before odd ones.
constexpr float kRedFactor = 1.2f;
constexpr float kCoarseFactor = 1.15f;

// Relaxation at level 0: the four neighbours, of which those outside the domain are 0.
template <class V>
FN_HD V relax5(V right_side, V north, V south, V west, V east, V inverse) {
  return (right_side + (north + south) + (west + east)) * inverse;
}

// Bilinear interpolation of u and restriction of r at one point. `coarse(I, J)`, `fine(i, j)` are 0 outside the level.
template <class Coarse>
FN_HD auto interpolate(const Coarse& coarse, int i, int j) {
  const int I = i >> 1, J = j >> 1;
  if (i & 1)
    return j & 1 ? ((coarse(I, J) + coarse(I, J + 1)) + (coarse(I + 1, J) + coarse(I + 1, J + 1))) * 0.25f
                 : (coarse(I, J) + coarse(I + 1, J)) * 0.5f;
  return j & 1 ? (coarse(I, J) + coarse(I, J + 1)) * 0.5f : coarse(I, J) * 1.0f;
}
template <class Fine>
FN_HD auto restricted(const Fine& fine, int I, int J) {
  const int i = 2 * I, j = 2 * J;
  return fine(i, j) + ((fine(i - 1, j) + fine(i + 1, j)) + (fine(i, j - 1) + fine(i, j + 1))) * 0.5f +
         ((fine(i - 1, j - 1) + fine(i - 1, j + 1)) + (fine(i + 1, j - 1) + fine(i + 1, j + 1))) * 0.25f;
}

// Largest error left after a cycle whose correction, the largest |u| of level 1 at its end, was `change`, that of the
// cycle before `before` (infinity: unknown; full multigrid's own cycle counts). NaN stays NaN.
FN_HD float error_left(float change, float before) {
  constexpr float kLeast = 1.0f / 3.0f, kMost = 0.9f;  // contraction of a cycle: one seen smaller is not trusted
  if (change == 0.0f) return 0.0f;
  float rate = change / before;
  if (rate < kLeast) rate = kLeast;
  if (rate > kMost) rate = kMost;
  return change * rate / (1.0f - rate);
}

}  // namespace fastnuggets::poisson

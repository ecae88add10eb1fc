// An object whose levels all fit into a block's shared memory is solved by one block for each channel, from the reading
// of the images to the writing of the result. Of a larger one the upper levels lie in global memory, where a block
// takes a tile with as much around it as a pass needs, so that a pass is one launch and no thread waits for another
// block: down (relaxation, residual, restriction) and up (interpolation, relaxation). The levels that fit are left to
// one block. How many launches there are depends on the largest object that may come; blocks of smaller objects, and of
// those that are done, return at once. Orders of relaxation and of sums are fixed, so nothing depends on a schedule.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "blend/poisson_cuda.h"
#include "blend/poisson_math.h"
#include "common/launch.cuh"
#include "common/storage.h"

namespace fastnuggets::poisson::cuda {
namespace {

using Index = std::int64_t;

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kWarp = 32;
constexpr int kMostThreads = 512;  // of a block that solves
constexpr int kTileThreads = 256;  // of one that passes over a tile
constexpr int kTile = 32;          // points of a tile on a side; even, so that it begins at a coarse point
constexpr int kEntries = 5;        // of a Stencil

// The type that is computed in.
template <class S>
using Real = typename Compute<S>::type;

// ---- points, and the threads that share them

// Points [top, bottom) x [left, right).
struct Box {
  int top, left, bottom, right;

  __device__ Box grown(int by) const { return {top - by, left - by, bottom + by, right + by}; }
  __device__ Box within(int ny, int nx) const { return {max(top, 0), max(left, 0), min(bottom, ny), min(right, nx)}; }
  __device__ bool has(int i, int j) const { return i >= top && i < bottom && j >= left && j < right; }
};

struct Block {
  int rank = int(threadIdx.x), size = int(blockDim.x);
};
struct Warp {
  int rank = int(threadIdx.x), size = kWarp;
};

// body(i, j) for the box's points of a colour: one of two (red if i + j is even, then black) or of four (even rows
// before odd ones, in a row even columns before odd ones), or of one. Up to a warp's threads take neighbours in a row.
template <int kColours, class Team, class Body>
__device__ void for_colour(const Team& team, const Box& box, int colour, Body body) {
  constexpr int kDown = kColours == 4 ? 2 : 1, kRight = kColours == 1 ? 1 : 2;
  int bits = 0;
  while ((kRight << bits) < box.right - box.left && (1 << bits) < kWarp) ++bits;
  const int top = kDown == 2 ? box.top + ((box.top ^ (colour >> 1)) & 1) : box.top;
  for (int i = top + (team.rank >> bits) * kDown; i < box.bottom; i += (team.size >> bits) * kDown) {
    const int odd = kColours == 2 ? colour ^ i : colour;
    const int left = kRight == 2 ? box.left + ((box.left ^ odd) & 1) : box.left;
    for (int j = left + (team.rank & ((1 << bits) - 1)) * kRight; j < box.right; j += kRight << bits) body(i, j);
  }
}
template <class Team, class Body>
__device__ void for_points(const Team& team, const Box& box, Body body) {
  for_colour<1>(team, box, 0, body);
}

// Of all threads of the block, for all of them.
__device__ unsigned block_max(unsigned x) {
  FN_SHARED(unsigned[kMostThreads / kWarp], of_warp);
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, lanes));
  __syncthreads();  // what the last call left is read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) x = max(x, of_warp[w]);
  return x;
}
__device__ double block_sum(double x) {
  FN_SHARED(double[kMostThreads / kWarp], of_warp);
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) x += of_warp[w];
  return x;
}

// ---- matrices

// A field in shared memory, with zeros where it goes beyond its level.
template <class R>
struct Field {
  R* data;
  int top, left, pitch;  // of the first element

  __device__ R& operator()(int i, int j) const { return data[(i - top) * pitch + (j - left)]; }
};

// A plane [ny, nx] in global memory.
template <class R>
struct Rows {
  R* data;
  int nx;

  __device__ R& operator()(int i, int j) const { return data[Index(i) * nx + j]; }
};

// The matrix of level 0. `ties` [ny, nx]: 1 + the neighbours inside the image of a pixel of the domain, 0 of others.
template <class R>
struct Five {
  static constexpr int kColours = 2;
  const std::uint8_t* ties;
  int ny, nx;

  __device__ bool inside(int i, int j) const { return i >= 0 && i < ny && j >= 0 && j < nx; }
  __device__ Index at(int i, int j) const { return Index(i) * nx + j; }
  __device__ bool active(int i, int j) const { return inside(i, j) && ties[at(i, j)] > 0; }
  __device__ int neighbours(int i, int j) const { return int(ties[at(i, j)]) - 1; }
  __device__ Stencil<R> operator()(int i, int j) const {
    if (!active(i, j)) return {};
    return {R(neighbours(i, j)), R(active(i, j + 1) ? -1 : 0), R(active(i + 1, j) ? -1 : 0), R(0), R(0)};
  }
  __device__ R relaxed(const Field<R>& u, int i, int j, R b, int colour, bool over) const {
    const int n = neighbours(i, j);
    const R inverse = n == 4 ? R(0.25) : n > 0 ? R(1) / R(n) : R(0);
    const R found = relax5(b, u(i - 1, j), u(i + 1, j), u(i, j - 1), u(i, j + 1), inverse);
    return over && colour == 0 ? u(i, j) + R(kRedFactor) * (found - u(i, j)) : found;
  }
  // After a relaxation: that of black points is 0.
  __device__ R residual(const Field<R>& u, int i, int j, R b) const {
    if (((i + j) & 1) || !active(i, j)) return R(0);
    return b + ((u(i - 1, j) + u(i + 1, j)) + (u(i, j - 1) + u(i, j + 1))) - R(neighbours(i, j)) * u(i, j);
  }
};

// That of a level above: planes of `points` numbers, one for each entry of a Stencil.
template <class R>
struct Nine {
  static constexpr int kColours = 4;
  R* entries;
  Index points;
  int ny, nx;

  __device__ bool inside(int i, int j) const { return i >= 0 && i < ny && j >= 0 && j < nx; }
  __device__ Index at(int i, int j) const { return Index(i) * nx + j; }
  __device__ bool active(int i, int j) const { return inside(i, j) && entries[at(i, j)] > R(0); }
  __device__ Stencil<R> operator()(int i, int j) const {
    if (!inside(i, j)) return {};
    const R* const e = entries + at(i, j);
    return {e[0], e[points], e[2 * points], e[3 * points], e[4 * points]};
  }
  __device__ void set(int i, int j, const Stencil<R>& s) const {
    R* const e = entries + at(i, j);
    e[0] = s.centre;
    e[points] = s.east;
    e[2 * points] = s.south;
    e[3 * points] = s.south_east;
    e[4 * points] = s.south_west;
  }
  // What the neighbours leave of b.
  __device__ R rest(const Field<R>& u, int i, int j, R b) const {
    const auto here = [&](int di, int dj) { return (*this)(i + di, j + dj); };
    R sum = R(0);
#pragma unroll
    for (int di = -1; di <= 1; ++di)
#pragma unroll
      for (int dj = -1; dj <= 1; ++dj)
        if (di != 0 || dj != 0) sum += entry(here, 0, 0, di, dj) * u(i + di, j + dj);
    return b - sum;
  }
  __device__ R relaxed(const Field<R>& u, int i, int j, R b, int colour, bool) const {
    const R centre = entries[at(i, j)], factor = colour == 3 ? R(1) : R(kCoarseFactor);
    return centre > R(0) ? u(i, j) + factor * (rest(u, i, j, b) / centre - u(i, j)) : R(0);
  }
  // After a relaxation: that of the last colour is 0.
  __device__ R residual(const Field<R>& u, int i, int j, R b) const {
    if (i & j & 1) return R(0);
    return rest(u, i, j, b) - entries[at(i, j)] * u(i, j);
  }
};

// As `galerkin` (poisson_math.h), but row after row of the fine matrix: unrolled, that would take all registers.
template <class R, class Matrix>
__device__ Stencil<R> coarse_stencil(const Matrix& fine, int i, int j) {
  const auto here = [&](int di, int dj) { return fine(2 * i + di, 2 * j + dj); };
  const auto weight = [](int distance) { return R(0.5) * R(max(2 - abs(distance), 0)); };
  Stencil<R> s{};
#pragma unroll 1
  for (int point = 0; point < 9; ++point) {
    const int y = point / 3 - 1, x = point % 3 - 1;
    const R own = weight(y) * weight(x);
#pragma unroll
    for (int di = -1; di <= 1; ++di) {
      const R here_y = weight(y + di) * own, below = weight(y + di - 2) * own;
#pragma unroll
      for (int dj = -1; dj <= 1; ++dj) {
        const R a = entry(here, y, x, di, dj), middle = weight(x + dj), right = weight(x + dj - 2);
        s.centre += here_y * middle * a;
        s.east += here_y * right * a;
        s.south += below * middle * a;
        s.south_east += below * right * a;
        s.south_west += below * weight(x + dj + 2) * a;
      }
    }
  }
  return s;
}

// `over`: a residual follows, and the last was not of an interpolation alone.
template <class Team, class Matrix, class R, class RightSide>
__device__ void relax(const Team& team, const Matrix& a, const Field<R>& u, const RightSide& b, const Box& box,
                      int colour, bool over) {
  for_colour<Matrix::kColours>(team, box, colour,
                               [&](int i, int j) { u(i, j) = a.relaxed(u, i, j, b(i, j), colour, over); });
}

// ---- what there is to do

struct Slot {  // of a cycle: bits of magnitudes, whose order is that of the numbers; NaN is above all
  unsigned change, largest;
};

struct Header {
  int top;  // the level from which on the object's levels fit into a block; 0: all do, or there is nothing to solve
  int ny, nx;
};

// A call, or a group of its objects. An object's memory: header, slots [C, 1 + max_cycles], means [C] of the right
// side, and for each level up to `top` the planes u [C], b [C], v [C] and the matrix, of `points` numbers each.
struct Job {
  Scene scene;
  Effort effort;
  float* info;
  void* image;       // forward
  const void* grad;  // backward, as what follows; null in forward
  void *grad_background, *grad_pixels, *grad_mask;

  Index first, count;  // objects of the group
  Shared shared;
  int ny, nx, top;  // of the largest object that may come
  char* memory;
  Index slots, means, at[kMaxLevels];  // bytes from the start of an object's memory
  Index bytes, points[kMaxLevels];

  // Whether an object's domain can be the whole image.
  FN_HD bool can_be_open() const { return ny == scene.H && nx == scene.W; }
};

template <class R>
class Memory {
 public:
  __device__ Memory(const Job& job, Index n) : job_(job), data_(job.memory + (n - job.first) * job.bytes) {}
  __device__ Header& header() const { return *reinterpret_cast<Header*>(data_); }
  __device__ Slot* slots(int c) const {
    return reinterpret_cast<Slot*>(data_ + job_.slots) + Index(c) * (1 + job_.effort.max_cycles);
  }
  __device__ double& mean(int c) const { return reinterpret_cast<double*>(data_ + job_.means)[c]; }
  // Planes of a level that is nx wide.
  __device__ Rows<R> u(int level, int c, int nx) const { return {plane(level, c), nx}; }
  __device__ Rows<R> b(int level, int c, int nx) const { return {plane(level, int(job_.scene.C) + c), nx}; }
  __device__ Rows<R> v(int level, int c, int nx) const { return {plane(level, 2 * int(job_.scene.C) + c), nx}; }
  __device__ Rows<std::uint8_t> ties(int nx) const { return {reinterpret_cast<std::uint8_t*>(matrix(0)), nx}; }

  __device__ Five<R> matrix_of(std::true_type, int, int ny, int nx) const { return {ties(nx).data, ny, nx}; }
  __device__ Nine<R> matrix_of(std::false_type, int level, int ny, int nx) const {
    return {matrix(level), job_.points[level], ny, nx};
  }

 private:
  const Job& job_;
  char* data_;

  __device__ R* plane(int level, int k) const {
    return reinterpret_cast<R*>(data_ + job_.at[level]) + k * job_.points[level];
  }
  __device__ R* matrix(int level) const { return plane(level, 3 * int(job_.scene.C)); }
};

__device__ float grey_levels(const Job& job, float error, float largest) {
  if (job.grad == nullptr) return job.scene.dtype == Dtype::uint8 ? error : error * 255.0f;
  return largest > 0.0f ? error / largest * 255.0f : error;
}

struct Progress {
  bool done;
  float error;
};
// Of a channel after so many cycles, that of full multigrid not counted.
__device__ Progress progress(const Job& job, const Slot* slots, int cycles) {
  Progress p{false, INFINITY};
  for (int k = 1; k <= cycles && !p.done; ++k) {
    const float error = error_left(bits_as<float>(slots[k].change), bits_as<float>(slots[k - 1].change));
    p.error = grey_levels(job, error, bits_as<float>(slots[k].largest));
    p.done = !(p.error > job.effort.tolerance);
  }
  return p;
}

__device__ void report(const Job& job, Index n, float error) {
  atomicMax(reinterpret_cast<unsigned*>(job.info + n), magnitude_bits(error));
}

// ---- images

// A channel of an object on its image; (i, j) count from the part that is inside.
template <class S>
struct Source {
  using R = Real<S>;
  const Scene& scene;
  Placed at;
  Plane image, object;
  int ny, nx;

  __device__ Source(const Scene& s, const Placed& p, int c)
      : scene(s), at(p), image(image_plane(s, p, c)), object(object_plane(s, p, c)), ny(p.ny), nx(p.nx) {}

  __device__ bool in_image(int i, int j) const {
    return at.y + i >= 0 && at.y + i < scene.H && at.x + j >= 0 && at.x + j < scene.W;
  }
  __device__ bool in_object(int i, int j) const { return i >= 0 && i < ny && j >= 0 && j < nx; }
  __device__ Index image_pixel(int i, int j) const { return image.start + i * image.row + j * image.column; }
  __device__ Index object_pixel(int i, int j) const { return object.start + i * object.row + j * object.column; }
  __device__ Index mask_pixel(int i, int j) const { return at.first + at.object_pixel(i, j); }

  __device__ R background(int i, int j) const { return R(static_cast<const S*>(scene.background)[image_pixel(i, j)]); }
  __device__ R colour(int i, int j) const { return R(static_cast<const S*>(scene.pixels)[object_pixel(i, j)]); }
  __device__ S mask(int i, int j) const { return static_cast<const S*>(scene.mask)[mask_pixel(i, j)]; }
  __device__ bool domain(int i, int j) const { return in_object(i, j) && in_domain(mask(i, j), scene.soft); }
  __device__ R weight(int i, int j) const { return in_object(i, j) ? R(unit_mask(mask(i, j))) : R(0); }
  __device__ R edge_weight(int i, int j, int qi, int qj) const {
    return scene.soft ? R(0.5) * (weight(i, j) + weight(qi, qj)) : R(1);
  }

  // body(qi, qj) for the neighbours inside the image.
  template <class Body>
  __device__ void for_neighbours(int i, int j, Body body) const {
    if (in_image(i - 1, j)) body(i - 1, j);
    if (in_image(i + 1, j)) body(i + 1, j);
    if (in_image(i, j - 1)) body(i, j - 1);
    if (in_image(i, j + 1)) body(i, j + 1);
  }
  // As Five has it.
  __device__ std::uint8_t ties(int i, int j) const {
    int count = 0;
    for_neighbours(i, j, [&](int, int) { ++count; });
    return domain(i, j) ? std::uint8_t(1 + count) : std::uint8_t(0);
  }
  __device__ R right_side(int i, int j) const {
    const bool bare = scene.guidance == Guidance::import && !scene.soft;
    R sum = R(0);
    for_neighbours(i, j, [&](int qi, int qj) {
      const bool inner = domain(qi, qj);
      if (bare && inner) return;
      const R fg = colour(i, j), fg_q = in_object(qi, qj) ? colour(qi, qj) : fg;
      sum += edge_right_side(scene.guidance, bare, fg, fg_q, background(i, j), background(qi, qj),
                             edge_weight(i, j, qi, qj), inner);
    });
    return sum;
  }
};

template <class S>
__device__ Real<S> right_side(const Job& job, const Source<S>& of, int i, int j) {
  if (!of.domain(i, j)) return 0;
  if (job.grad == nullptr) return of.right_side(i, j);
  return Real<S>(static_cast<const S*>(job.grad)[of.image_pixel(i, j)]);
}

// If the domain is the whole image, so that the constant is open: the mean of field(i, j), which is taken off; else 0.
// All threads of the block must come.
template <class S, class Each>
__device__ double close(const Source<S>& of, Each field) {
  if (of.ny != of.scene.H || of.nx != of.scene.W) return 0;
  const Box all{0, 0, of.ny, of.nx};
  double count = 0, sum = 0;
  for_points(Block(), all, [&](int i, int j) {
    count += of.domain(i, j) ? 1 : 0;
    sum += double(field(i, j));
  });
  count = block_sum(count);
  sum = block_sum(sum);
  if (count < double(of.ny) * of.nx) return 0;
  for_points(Block(), all, [&](int i, int j) { field(i, j) -= Real<S>(sum / count); });
  __syncthreads();
  return sum / count;
}

__device__ std::uint8_t stored(std::uint8_t, float x) {
  return std::uint8_t((x > 0.0f ? min(x, 255.0f) : 0.0f) + 0.5f);
}
template <class R>
__device__ R stored(R, R x) {
  return x;
}

template <class S>
__device__ void blend_pixel(const Job& job, const Source<S>& of, int i, int j, Real<S> h) {
  if (of.domain(i, j)) static_cast<S*>(job.image)[of.image_pixel(i, j)] = stored(S(), of.colour(i, j) + h);
}

// ---- solution by one block

struct BlockLevel {
  int ny, nx, u, b, matrix;  // the last three: where they begin in shared memory, in numbers
};

// Bytes that levels from one of [ny, nx] on take; that is level 0 if kFinest. u has a rim of zeros.
template <class R, bool kFinest>
FN_HD Index block_bytes(int ny, int nx, BlockLevel* levels = nullptr) {
  Index used = 0;
  for (int l = 0;; ++l) {
    const bool finest = kFinest && l == 0;
    const Index points = Index(ny) * nx, u = used, b = u + Index(ny + 2) * (nx + 2), matrix = b + points;
    used = matrix + (finest ? (points + Index(sizeof(R)) - 1) / Index(sizeof(R)) : kEntries * points);
    if (levels != nullptr) levels[l] = {ny, nx, int(u), int(b), int(matrix)};
    if (!finest && ny <= kCoarsest && nx <= kCoarsest) return used * Index(sizeof(R));
    ny = coarse_size(ny);
    nx = coarse_size(nx);
  }
}

template <class R, bool kFinest>
class BlockGrid {
 public:
  // All threads of the block must come. Afterwards u is 0 everywhere.
  __device__ BlockGrid(R* memory, BlockLevel* levels, int ny, int nx) : memory_(memory), level_(levels), last_(0) {
    if (threadIdx.x == 0) block_bytes<R, kFinest>(ny, nx, levels);
    __syncthreads();
    while ((kFinest && last_ == 0) || level_[last_].ny > kCoarsest || level_[last_].nx > kCoarsest) ++last_;
    for (int l = 0; l <= last_; ++l)
      for_points(team_, box(l).grown(1), [field = u(l)](int i, int j) { field(i, j) = R(0); });
  }

  __device__ Box box(int l) const { return {0, 0, level_[l].ny, level_[l].nx}; }
  __device__ Field<R> u(int l) const { return {memory_ + level_[l].u, -1, -1, level_[l].nx + 2}; }
  __device__ Field<R> b(int l) const { return {memory_ + level_[l].b, 0, 0, level_[l].nx}; }
  __device__ R* matrix(int l) const { return memory_ + level_[l].matrix; }
  __device__ Nine<R> nine(int l) const {
    return {matrix(l), Index(level_[l].ny) * level_[l].nx, level_[l].ny, level_[l].nx};
  }

  // The matrices of the levels above the first.
  __device__ void build() const {
    for (int l = 0; l < last_; ++l) {
      with_matrix(l, [&](const auto& a) {
        for_points(team_, box(l + 1), [&](int i, int j) { nine(l + 1).set(i, j, coarse_stencil<R>(a, i, j)); });
      });
      __syncthreads();
    }
  }

  // Full multigrid. Returns what cycle() does of the last one.
  __device__ unsigned full() const {
    for (int l = 0; l < last_; ++l) {
      const Field<R> fine = b(l);
      const Box inside = box(l);
      restrict(l, [=](int i, int j) { return inside.has(i, j) ? fine(i, j) : R(0); });
      __syncthreads();
    }
    relax_coarsest();
    unsigned change = 0;
    for (int l = last_ - 1; l >= 0; --l) {
      interpolate_to(l);
      change = cycle(l, false);
    }
    return change;
  }

  // A V cycle on the levels from `top`. Returns the bits of its correction if that is level 0.
  __device__ unsigned cycle(int top, bool over) const {
    for (int l = top; l < last_; ++l) {
      relax_level(l, over || l > top);
      with_matrix(l, [&](const auto& a) {
        const Field<R> fine = u(l), coarse = u(l + 1), right = b(l);
        restrict(l, [&](int i, int j) { return a.inside(i, j) ? a.residual(fine, i, j, right(i, j)) : R(0); });
        for_points(team_, box(l + 1), [&](int i, int j) { coarse(i, j) = R(0); });
      });
      __syncthreads();
    }
    relax_coarsest();
    unsigned change = 0;
    for (int l = last_ - 1; l >= top; --l) {
      if (kFinest && l == 0) change = largest(1);
      interpolate_to(l);
      relax_level(l, false);
    }
    return change;
  }

  // Bits of the largest |u|.
  __device__ unsigned largest(int l) const {
    unsigned most = 0;
    for_points(team_, box(l), [&](int i, int j) { most = max(most, magnitude_bits(float(u(l)(i, j)))); });
    return block_max(most);
  }

 private:
  const Block team_{};
  R* memory_;
  const BlockLevel* level_;
  int last_;

  template <class Body>
  __device__ void with_matrix(int l, Body body) const {
    if constexpr (kFinest) {
      if (l == 0) return body(Five<R>{reinterpret_cast<const std::uint8_t*>(matrix(0)), level_[0].ny, level_[0].nx});
    }
    body(nine(l));
  }

  template <class Fine>
  __device__ void restrict(int l, const Fine& fine) const {
    const Field<R> to = b(l + 1);
    for_points(team_, box(l + 1), [&](int i, int j) { to(i, j) = restricted(fine, i, j); });
  }

  __device__ void interpolate_to(int l) const {
    with_matrix(l, [&](const auto& a) {
      const Field<R> fine = u(l), coarse = u(l + 1);
      for_points(team_, box(l), [&](int i, int j) {
        if (a.active(i, j)) fine(i, j) += interpolate(coarse, i, j);
      });
    });
    __syncthreads();
  }

  __device__ void relax_level(int l, bool over) const {
    with_matrix(l, [&](const auto& a) {
      for (int colour = 0; colour < std::decay_t<decltype(a)>::kColours; ++colour) {
        relax(team_, a, u(l), b(l), box(l), colour, over);
        __syncthreads();
      }
    });
  }

  __device__ void relax_coarsest() const {
    if (threadIdx.x < kWarp) {
      const Warp team;
      for (int k = 0; k < 8 * kCoarsestSweeps; ++k) {  // there and back
        relax(team, nine(last_), u(last_), b(last_), box(last_), (k & 4) ? 7 - (k & 7) : k & 3, true);
        __syncwarp();
      }
    }
    __syncthreads();
  }
};

template <class R>
__device__ bool fits(const Job& job, const Placed& p) {
  return block_bytes<R, true>(p.ny, p.nx) <= job.shared;
}

// One block for each channel of an object. Backward, the solution is left in the object's memory.
template <class S>
__global__ void __launch_bounds__(kMostThreads, 1) solve_small(const __grid_constant__ Job job) {
  using R = Real<S>;
  FN_DYNAMIC_SHARED(R, memory);
  FN_SHARED(BlockLevel[kMaxLevels], levels);
  const Index n = job.first + Index(blockIdx.x) / job.scene.C;
  const int c = int(Index(blockIdx.x) % job.scene.C);
  const Placed p = place(job.scene, n);
  if (p.ny == 0 || !fits<R>(job, p)) return;
  const Source<S> of(job.scene, p, c);
  const BlockGrid<R, true> grid(memory, levels, p.ny, p.nx);
  const Block team;
  const Field<R> u = grid.u(0), b = grid.b(0);
  std::uint8_t* const ties = reinterpret_cast<std::uint8_t*>(grid.matrix(0));
  for_points(team, grid.box(0), [&](int i, int j) {
    ties[i * p.nx + j] = of.ties(i, j);
    b(i, j) = right_side(job, of, i, j);
  });
  __syncthreads();
  const double mean = close(of, b);
  grid.build();
  Slot slots[2];
  slots[0] = {grid.full(), 0};
  Progress now{false, INFINITY};
  for (int k = 0; k < job.effort.max_cycles && !now.done; ++k) {
    slots[1].change = grid.cycle(0, true);
    slots[1].largest = job.grad != nullptr ? grid.largest(0) : 0;
    now = progress(job, slots, 1);
    slots[0] = slots[1];
  }
  if (threadIdx.x == 0) report(job, n, now.error);
  close(of, u);
  if (job.grad == nullptr) {
    for_points(team, grid.box(0), [&](int i, int j) { blend_pixel(job, of, i, j, u(i, j)); });
  } else {
    const Memory<R> keep(job, n);
    const Rows<R> to = keep.u(0, c, p.nx);
    for_points(team, grid.box(0), [&](int i, int j) { to(i, j) = u(i, j); });
    if (threadIdx.x == 0) keep.mean(c) = mean;
  }
}

// ---- solution by many blocks

// A block for each tile of [ny, nx] points, each channel and each object.
struct Tiles {
  unsigned down, right, channels;

  Tiles(Index ny, Index nx, Index c)
      : down(unsigned((ny + kTile - 1) / kTile)), right(unsigned((nx + kTile - 1) / kTile)), channels(unsigned(c)) {}
  dim3 grid(const Job& job) const { return dim3(unsigned(job.count) * channels * down * right); }
};
struct Where {
  Index n;
  int c;
  unsigned tile;
  Box box;

  __device__ Where(const Job& job, const Tiles& tiles) {
    const unsigned all = tiles.down * tiles.right, rest = blockIdx.x / tiles.channels;
    c = int(blockIdx.x % tiles.channels);
    tile = rest % all;
    n = job.first + rest / all;
    const int top = int(tile / tiles.right) * kTile, left = int(tile % tiles.right) * kTile;
    box = {top, left, top + kTile, left + kTile};
  }
};

struct Size {
  int ny, nx;
};
FN_HD Size size_of(int level, int ny, int nx) {
  for (int l = 0; l < level; ++l) {
    ny = coarse_size(ny);
    nx = coarse_size(nx);
  }
  return {ny, nx};
}

// The first level, from 1, from which on all fit into a block.
template <class R>
FN_HD int top_level(Shared shared, int ny, int nx) {
  int level = 0;
  do {
    ny = coarse_size(ny);
    nx = coarse_size(nx);
    ++level;
  } while (block_bytes<R, false>(ny, nx) > shared);
  return level;
}

// Level 0, and the object's header.
template <class S>
__global__ void __launch_bounds__(kTileThreads, 1)
    prepare(const __grid_constant__ Job job, const __grid_constant__ Tiles tiles) {
  using R = Real<S>;
  const Where here(job, tiles);
  const Memory<R> memory(job, here.n);
  const Placed p = place(job.scene, here.n);
  const bool large = p.ny > 0 && !fits<R>(job, p);
  if (here.tile == 0 && here.c == 0 && threadIdx.x == 0)
    memory.header() = {large ? top_level<R>(job.shared, p.ny, p.nx) : 0, p.ny, p.nx};
  if (!large) return;
  const Source<S> of(job.scene, p, here.c);
  for (int k = int(threadIdx.x); here.tile == 0 && k <= job.effort.max_cycles; k += kTileThreads)
    memory.slots(here.c)[k] = {0, 0};
  const Rows<std::uint8_t> ties = memory.ties(p.nx);
  const Rows<R> b = memory.b(0, here.c, p.nx);
  for_points(Block(), here.box.within(p.ny, p.nx), [&](int i, int j) {
    if (here.c == 0) ties(i, j) = of.ties(i, j);
    b(i, j) = right_side(job, of, i, j);
  });
}

// The matrix and the right side of a level from 1 on.
template <class R, bool kFinest>
__global__ void __launch_bounds__(kTileThreads, 1)
    coarsen(const __grid_constant__ Job job, const __grid_constant__ Tiles tiles, int level) {
  const Where here(job, tiles);
  const Memory<R> memory(job, here.n);
  const Header h = memory.header();
  if (level > h.top) return;
  const Size fine = size_of(level - 1, h.ny, h.nx), size = size_of(1, fine.ny, fine.nx);
  const auto a = memory.matrix_of(std::bool_constant<kFinest>(), level - 1, fine.ny, fine.nx);
  const Nine<R> coarse = memory.matrix_of(std::false_type(), level, size.ny, size.nx);
  const Rows<R> from = memory.b(level - 1, here.c, fine.nx), to = memory.b(level, here.c, size.nx);
  for_points(Block(), here.box.within(size.ny, size.nx), [&](int i, int j) {
    if (here.c == 0) coarse.set(i, j, coarse_stencil<R>(a, i, j));
    to(i, j) = restricted([&](int k, int l) { return a.inside(k, l) ? from(k, l) : R(0); }, i, j);
  });
}

enum class Start : int { zero, stored, interpolated };  // what u is at the start of a pass

// One relaxation of a level, from u (or what else is said) to v; restricts the residual to b of the next.
template <class R, bool kFinest>
__global__ void __launch_bounds__(kTileThreads, 1)
    down(const __grid_constant__ Job job, const __grid_constant__ Tiles tiles, int level, Start start, int number) {
  using Finest = std::bool_constant<kFinest>;
  constexpr int kColours = kFinest ? 2 : 4, kSide = kTile + 3 + 2 * kColours;
  FN_SHARED(R[kSide * kSide], values);
  FN_SHARED(R[(kTile + 1) * (kTile + 1)], residuals);
  const Where here(job, tiles);
  const Memory<R> memory(job, here.n);
  const Header h = memory.header();
  if (level >= h.top || progress(job, memory.slots(here.c), number - 1).done) return;
  const Size size = size_of(level, h.ny, h.nx), coarse = size_of(1, size.ny, size.nx);
  const auto a = memory.matrix_of(Finest(), level, size.ny, size.nx);
  const Rows<R> b = memory.b(level, here.c, size.nx), from = memory.u(level, here.c, size.nx);
  const Rows<R> above = memory.u(level + 1, here.c, coarse.nx);
  const Block team;

  // A residual needs the points around it, each of which needs a rim for each of its colours.
  const Box relaxed{here.box.top - 2, here.box.left - 2, here.box.bottom + 1, here.box.right + 1};
  const Box loaded = relaxed.grown(kColours);
  const Field<R> u{values, loaded.top, loaded.left, kSide};
  for_points(team, loaded, [&](int i, int j) {
    const bool active = start != Start::zero && a.active(i, j);
    if (start == Start::interpolated && active)
      u(i, j) = interpolate(above, i, j);
    else
      u(i, j) = active ? from(i, j) : R(0);
  });
  __syncthreads();
  for (int colour = 0; colour < kColours; ++colour) {
    const Box box = relaxed.grown(kColours - 1 - colour).within(size.ny, size.nx);
    relax(team, a, u, b, box, colour, start != Start::interpolated);
    __syncthreads();
  }
  const Rows<R> v = memory.v(level, here.c, size.nx);
  for_points(team, here.box.within(size.ny, size.nx), [&](int i, int j) { v(i, j) = u(i, j); });
  const Box around{here.box.top - 1, here.box.left - 1, here.box.bottom, here.box.right};
  const Field<R> r{residuals, around.top, around.left, kTile + 1};
  for_points(team, around, [&](int i, int j) { r(i, j) = a.inside(i, j) ? a.residual(u, i, j, b(i, j)) : R(0); });
  __syncthreads();
  const Rows<R> to = memory.b(level + 1, here.c, coarse.nx);
  const Box half{here.box.top / 2, here.box.left / 2, here.box.bottom / 2, here.box.right / 2};
  for_points(team, half.within(coarse.ny, coarse.nx), [&](int i, int j) { to(i, j) = restricted(r, i, j); });
}

// Adds the next level's correction to v, relaxes once, to u.
template <class R, bool kFinest>
__global__ void __launch_bounds__(kTileThreads, 1)
    up(const __grid_constant__ Job job, const __grid_constant__ Tiles tiles, int level, int number) {
  using Finest = std::bool_constant<kFinest>;
  constexpr int kColours = kFinest ? 2 : 4, kSide = kTile + 2 * kColours;
  FN_SHARED(R[kSide * kSide], values);
  const Where here(job, tiles);
  const Memory<R> memory(job, here.n);
  const Header h = memory.header();
  if (level >= h.top || progress(job, memory.slots(here.c), number - 1).done) return;
  const Size size = size_of(level, h.ny, h.nx), coarse = size_of(1, size.ny, size.nx);
  const auto a = memory.matrix_of(Finest(), level, size.ny, size.nx);
  const Rows<R> b = memory.b(level, here.c, size.nx), v = memory.v(level, here.c, size.nx);
  const Rows<R> above = memory.u(level + 1, here.c, coarse.nx), to = memory.u(level, here.c, size.nx);
  const Block team;

  const Box loaded = here.box.grown(kColours);
  const Field<R> u{values, loaded.top, loaded.left, kSide};
  for_points(team, loaded, [&](int i, int j) {
    const bool active = a.active(i, j);
    u(i, j) = active ? v(i, j) + interpolate(above, i, j) : R(0);
  });
  __syncthreads();
  for (int colour = 0; colour < kColours; ++colour) {
    const Box box = here.box.grown(kColours - 1 - colour).within(size.ny, size.nx);
    relax(team, a, u, b, box, colour, false);
    __syncthreads();
  }
  unsigned change = 0, largest = 0;
  for_points(team, here.box.within(size.ny, size.nx), [&](int i, int j) {
    to(i, j) = u(i, j);
    if (kFinest && job.grad != nullptr) largest = max(largest, magnitude_bits(float(u(i, j))));
  });
  if constexpr (kFinest) {
    const Box half{here.box.top / 2, here.box.left / 2, here.box.bottom / 2, here.box.right / 2};
    for_points(team, half.within(coarse.ny, coarse.nx),
               [&](int i, int j) { change = max(change, magnitude_bits(float(above(i, j)))); });
    change = block_max(change);
    largest = block_max(largest);
    if (threadIdx.x > 0) return;
    atomicMax(&memory.slots(here.c)[number].change, change);
    atomicMax(&memory.slots(here.c)[number].largest, largest);
  }
}

// The levels that fit into a block: full multigrid, or one cycle, for what starts at level `from`.
template <class R>
__global__ void __launch_bounds__(kMostThreads, 1)
    solve_top(const __grid_constant__ Job job, bool full, int from, int number) {
  FN_DYNAMIC_SHARED(R, shared);
  FN_SHARED(BlockLevel[kMaxLevels], levels);
  const Index n = job.first + Index(blockIdx.x) / job.scene.C;
  const int c = int(Index(blockIdx.x) % job.scene.C);
  const Memory<R> memory(job, n);
  const Header h = memory.header();
  if (from >= h.top || progress(job, memory.slots(c), number - 1).done) return;
  const Size size = size_of(h.top, h.ny, h.nx);
  const BlockGrid<R, false> grid(shared, levels, size.ny, size.nx);
  const Nine<R> stored = memory.matrix_of(std::false_type(), h.top, size.ny, size.nx), a = grid.nine(0);
  const Rows<R> b = memory.b(h.top, c, size.nx), to = memory.u(h.top, c, size.nx);
  const Block team;
  for_points(team, grid.box(0), [&](int i, int j) {
    a.set(i, j, stored(i, j));
    grid.b(0)(i, j) = b(i, j);
  });
  __syncthreads();
  grid.build();
  if (full)
    grid.full();
  else
    grid.cycle(0, true);
  for_points(team, grid.box(0), [&](int i, int j) { to(i, j) = grid.u(0)(i, j); });
}

// Closes the right side, or else the solution, of large objects; a block for each channel.
template <class S>
__global__ void __launch_bounds__(kMostThreads, 1) close_large(const __grid_constant__ Job job, bool right_side) {
  using R = Real<S>;
  const Index n = job.first + Index(blockIdx.x) / job.scene.C;
  const int c = int(Index(blockIdx.x) % job.scene.C);
  const Memory<R> memory(job, n);
  if (memory.header().top == 0) return;
  const Source<S> of(job.scene, place(job.scene, n), c);
  const double mean = close(of, right_side ? memory.b(0, c, of.nx) : memory.u(0, c, of.nx));
  if (right_side && threadIdx.x == 0) memory.mean(c) = mean;
}

// ---- before and after

__global__ void __launch_bounds__(kTileThreads, 1) begin(const __grid_constant__ Job job) {
  const Index n = Index(blockIdx.x) * kTileThreads + threadIdx.x;
  if (n < job.scene.N) job.info[n] = place(job.scene, n).legal ? 0.0f : NAN;
}

template <class R>
__global__ void __launch_bounds__(kTileThreads, 1) report_large(const __grid_constant__ Job job) {
  const Index n = job.first + Index(blockIdx.x) * kTileThreads + threadIdx.x;
  if (n >= job.first + job.count) return;
  const Memory<R> memory(job, n);
  if (memory.header().top == 0) return;
  for (int c = 0; c < job.scene.C; ++c) report(job, n, progress(job, memory.slots(c), job.effort.max_cycles).error);
}

template <class S>
__global__ void __launch_bounds__(kTileThreads, 1)
    blend_large(const __grid_constant__ Job job, const __grid_constant__ Tiles tiles) {
  using R = Real<S>;
  const Where here(job, tiles);
  const Memory<R> memory(job, here.n);
  if (memory.header().top == 0) return;
  const Source<S> of(job.scene, place(job.scene, here.n), here.c);
  const Rows<R> u = memory.u(0, here.c, of.nx);
  for_points(Block(), here.box.within(of.ny, of.nx), [&](int i, int j) { blend_pixel(job, of, i, j, u(i, j)); });
}

// ---- gradients

// What the edge from (i, j) to its neighbour gives to the gradients of (i, j), of whose guidance the cotangent is the
// difference of solution s.
template <class S>
__device__ EdgeSlopes<Real<S>> edge_grads(const Source<S>& of, const Rows<Real<S>>& s, int i, int j, int qi, int qj) {
  using R = Real<S>;
  const bool here = of.domain(i, j), there = of.domain(qi, qj);
  if (!here && !there) return {};
  const R cotangent = (here ? s(i, j) : R(0)) - (there ? s(qi, qj) : R(0));
  const bool both = of.in_object(i, j) && of.in_object(qi, qj);
  const R fg = both ? of.colour(i, j) - of.colour(qi, qj) : R(0);
  const EdgeSlopes<R> slopes =
      edge_slopes(of.scene.guidance, fg, of.background(i, j) - of.background(qi, qj), of.edge_weight(i, j, qi, qj));
  return {both ? cotangent * slopes.by_fg : R(0), cotangent * slopes.by_bg, R(0.5) * cotangent * slopes.by_weight};
}

// Pixels of the domain and their neighbours; tiles are of the object with a rim of one pixel.
template <class S>
__global__ void __launch_bounds__(kTileThreads, 1)
    background_grads(const __grid_constant__ Job job, const __grid_constant__ Tiles tiles) {
  using R = Real<S>;
  const Where here(job, tiles);
  const Placed p = place(job.scene, here.n);
  if (p.ny == 0) return;
  const Source<S> of(job.scene, p, here.c);
  const Rows<R> s = Memory<R>(job, here.n).u(0, here.c, p.nx);
  S* const grad = static_cast<S*>(job.grad_background);
  for_points(Block(), here.box.within(p.ny + 2, p.nx + 2), [&](int row, int column) {
    const int i = row - 1, j = column - 1;
    if (!of.in_image(i, j)) return;
    const bool inner = of.domain(i, j);
    bool touched = inner;
    R sum = R(0);
    of.for_neighbours(i, j, [&](int qi, int qj) {
      sum += edge_grads(of, s, i, j, qi, qj).by_bg;
      if (inner || !of.domain(qi, qj)) return;
      sum += s(qi, qj);
      touched = true;
    });
    if (touched) grad[of.image_pixel(i, j)] = (inner ? R(0) : R(grad[of.image_pixel(i, j)])) + sum;
  });
}

__device__ bool same_pixels(const Placed& a, const Placed& b) {
  return a.legal && b.legal && a.first == b.first && a.h == b.h && a.w == b.w;
}

// Several rows of the table may name the same pixels: then the first of the group gathers the gradients of all.
template <class S>
__global__ void __launch_bounds__(kTileThreads, 1)
    object_grads(const __grid_constant__ Job job, const __grid_constant__ Tiles tiles) {
  using R = Real<S>;
  const Where here(job, tiles);
  const Placed own = place(job.scene, here.n);
  if (!own.legal) return;
  for (Index m = job.first; m < here.n; ++m)
    if (same_pixels(own, place(job.scene, m))) return;
  S *const grad = static_cast<S*>(job.grad_pixels), *const grad_mask = static_cast<S*>(job.grad_mask);
  for (Index m = here.n; m < job.first + job.count; ++m) {
    const Placed p = place(job.scene, m);
    if (p.ny == 0 || !same_pixels(own, p)) continue;
    const Memory<R> memory(job, m);
    for_points(Block(), here.box.within(int(own.h), int(own.w)), [&](int row, int column) {
      const int i = row - int(p.oy), j = column - int(p.ox);
      R weight = R(0);
      for (int c = 0; c < job.scene.C; ++c) {
        const Source<S> of(job.scene, p, c);
        if (!of.in_object(i, j)) return;
        R sum = R(0);
        if (job.can_be_open() && of.domain(i, j)) sum = R(memory.mean(c));
        of.for_neighbours(i, j, [&](int qi, int qj) {
          const EdgeSlopes<R> slopes = edge_grads(of, memory.u(0, c, p.nx), i, j, qi, qj);
          sum += slopes.by_fg;
          weight += slopes.by_weight;
        });
        if (grad != nullptr) grad[of.object_pixel(i, j)] += sum;
      }
      const Index at = p.first + p.object_pixel(i, j);
      if (grad_mask != nullptr) grad_mask[at] += weight;
    });
  }
}

// ---- launches

constexpr Index kMostScratch = Index(1) << 30;  // more than one object's only if that needs it
constexpr Shared kStaticShared = 2048;          // what the kernels declare beside what is asked for

Job job_of(const Scene& scene, const Effort& effort, float* info, Shared shared) {
  Job job{};
  job.scene = scene;
  job.effort = effort;
  job.effort.max_cycles = std::max(effort.max_cycles, 0);
  job.info = info;
  job.shared = shared - kStaticShared;
  job.ny = int(std::min(scene.max_h, scene.H));
  job.nx = int(std::min(scene.max_w, scene.W));
  return job;
}
Job job_of(const Blend& how, Shared shared) {
  Job job = job_of(how.scene, how.effort, how.info, shared);
  job.image = how.image;
  return job;
}
Job job_of(const BlendBackward& how, Shared shared) {
  Job job = job_of(how.scene, how.effort, how.info, shared);
  job.grad = how.grad;
  job.grad_background = how.grad_background;
  job.grad_pixels = how.grad_pixels;
  job.grad_mask = how.grad_mask;
  return job;
}

// Lays out the memory of an object.
template <class R>
void lay_out(Job& job) {
  const auto take = [&](Index bytes) {
    const Index at = job.bytes;
    job.bytes += (bytes + 15) / 16 * 16;
    return at;
  };
  const bool small = block_bytes<R, true>(job.ny, job.nx) <= job.shared;
  job.top = small ? 0 : top_level<R>(job.shared, job.ny, job.nx);
  if (small && job.grad == nullptr) return;
  take(sizeof(Header));
  job.slots = take(job.scene.C * (1 + job.effort.max_cycles) * Index(sizeof(Slot)));
  job.means = take(job.scene.C * Index(sizeof(double)));
  for (int l = 0; l <= job.top; ++l) {
    const Size size = size_of(l, job.ny, job.nx);
    job.points[l] = Index(size.ny) * size.nx;
    const Index matrix = l == 0 ? 1 : kEntries;
    job.at[l] = take((small ? job.scene.C : 3 * job.scene.C + matrix) * job.points[l] * Index(sizeof(R)));
  }
}

template <class R>
class Launches {
 public:
  Launches(const Job& job, cudaStream_t stream) : job_(job), stream_(stream) {}

  void solve_large() const {
    for (int l = 1; l <= job_.top; ++l) {
      if (l == 1)
        FN_LAUNCH((coarsen<R, true>), tiles(l).grid(job_), dim3(kTileThreads), 0, stream_, job_, tiles(l), l);
      else
        FN_LAUNCH((coarsen<R, false>), tiles(l).grid(job_), dim3(kTileThreads), 0, stream_, job_, tiles(l), l);
    }
    solve_top_levels(true, 0, 0);
    for (int l = job_.top - 1; l >= 0; --l) cycle(l, Start::interpolated, 0);
    for (int k = 1; k <= job_.effort.max_cycles; ++k) cycle(0, Start::stored, k);
  }

 private:
  const Job& job_;
  cudaStream_t stream_;

  Tiles tiles(int level) const {
    const Size size = size_of(level, job_.ny, job_.nx);
    return Tiles(size.ny, size.nx, job_.scene.C);
  }
  // With one that holds the last coarse points, which may lie beyond the level.
  Tiles tiles_below(int level) const {
    const Size size = size_of(level, job_.ny, job_.nx);
    return Tiles(size.ny + 1, size.nx + 1, job_.scene.C);
  }
  void solve_top_levels(bool full, int from, int number) const {
    FN_LAUNCH(solve_top<R>, dim3(unsigned(job_.count * job_.scene.C)), dim3(kMostThreads), std::size_t(job_.shared),
              stream_, job_, full, from, number);
  }
  void cycle(int from, Start start, int number) const {
    for (int l = from; l < job_.top; ++l) {
      const Start here = l == from ? start : Start::zero;
      if (l == 0)
        FN_LAUNCH((down<R, true>), tiles_below(l).grid(job_), dim3(kTileThreads), 0, stream_, job_, tiles_below(l), l,
                  here, number);
      else
        FN_LAUNCH((down<R, false>), tiles_below(l).grid(job_), dim3(kTileThreads), 0, stream_, job_, tiles_below(l), l,
                  here, number);
    }
    solve_top_levels(false, from, number);
    for (int l = job_.top - 1; l >= from; --l) {
      if (l == 0)
        FN_LAUNCH((up<R, true>), tiles_below(l).grid(job_), dim3(kTileThreads), 0, stream_, job_, tiles_below(l), l,
                  number);
      else
        FN_LAUNCH((up<R, false>), tiles(l).grid(job_), dim3(kTileThreads), 0, stream_, job_, tiles(l), l, number);
    }
  }
};

// A block for each channel of an object.
dim3 channels(const Job& job) { return dim3(unsigned(job.count * job.scene.C)); }
dim3 objects(Index count) { return dim3(unsigned((count + kTileThreads - 1) / kTileThreads)); }

template <class S>
void solve(const Job& job, cudaStream_t stream) {
  using R = Real<S>;
  const Index points = Index(job.ny) * job.nx;
  const int threads = points <= 1024 ? 128 : points <= 4096 ? 256 : kMostThreads;
  const Index bytes = std::min<Index>(job.shared, block_bytes<R, true>(job.ny, job.nx));
  FN_LAUNCH(solve_small<S>, channels(job), dim3(unsigned(threads)), std::size_t(bytes), stream, job);
  if (job.top == 0) return;
  const Tiles tiles(job.ny, job.nx, job.scene.C);
  const auto close_all = [&](bool right_side) {
    if (job.can_be_open()) FN_LAUNCH(close_large<S>, channels(job), dim3(kMostThreads), 0, stream, job, right_side);
  };
  FN_LAUNCH(prepare<S>, tiles.grid(job), dim3(kTileThreads), 0, stream, job, tiles);
  close_all(true);
  Launches<R>(job, stream).solve_large();
  FN_LAUNCH(report_large<R>, objects(job.count), dim3(kTileThreads), 0, stream, job);
  close_all(false);
  if (job.grad == nullptr) FN_LAUNCH(blend_large<S>, tiles.grid(job), dim3(kTileThreads), 0, stream, job, tiles);
}

template <class S>
void write_grads(const Job& job, cudaStream_t stream) {
  const Tiles around(job.ny + 2, job.nx + 2, job.scene.C), object(job.scene.max_h, job.scene.max_w, 1);
  if (job.grad_background != nullptr)
    FN_LAUNCH(background_grads<S>, around.grid(job), dim3(kTileThreads), 0, stream, job, around);
  if (job.grad_pixels != nullptr || job.grad_mask != nullptr)
    FN_LAUNCH(object_grads<S>, object.grid(job), dim3(kTileThreads), 0, stream, job, object);
}

// Objects of a group: as many as memory and a grid hold.
Index group(const Job& job, std::size_t bytes) {
  const Tiles most(std::max<Index>(job.ny + 2, job.scene.max_h), std::max<Index>(job.nx + 2, job.scene.max_w), 1);
  const Index blocks = Index(most.down) * most.right * job.scene.C,
              room = job.bytes > 0 ? Index(bytes) / job.bytes : job.scene.N;
  return std::max<Index>(1, std::min({room, job.scene.N, Index(0x7FFFFFFF) / blocks}));
}

template <class S>
void run(Job job, Scratch scratch, cudaStream_t stream) {
  FN_LAUNCH(begin, objects(job.scene.N), dim3(kTileThreads), 0, stream, job);
  if (job.ny <= 0 || job.nx <= 0 || job.scene.C <= 0) return;
  lay_out<Real<S>>(job);
  job.memory = static_cast<char*>(scratch.data);
  const Index most = group(job, scratch.bytes);
  for (; job.first < job.scene.N; job.first += most) {
    job.count = std::min(most, job.scene.N - job.first);
    solve<S>(job, stream);
    if constexpr (!std::is_same_v<S, std::uint8_t>)
      if (job.grad != nullptr) write_grads<S>(job, stream);
  }
}

void run(const Job& job, Scratch scratch, cudaStream_t stream) {
  if (job.scene.dtype == Dtype::uint8) return run<std::uint8_t>(job, scratch, stream);
  return job.scene.dtype == Dtype::float64 ? run<double>(job, scratch, stream) : run<float>(job, scratch, stream);
}

std::size_t scratch_bytes(Job job) {
  if (job.ny <= 0 || job.nx <= 0 || job.scene.C <= 0) return 0;
  if (job.scene.dtype == Dtype::float64)
    lay_out<double>(job);
  else
    lay_out<float>(job);
  return std::size_t(std::max(job.bytes, std::min(job.bytes * job.scene.N, kMostScratch)));
}

}  // namespace

std::size_t scratch_bytes(const Blend& how, Shared shared) { return scratch_bytes(job_of(how, shared)); }
void blend(const Blend& how, Shared shared, Scratch scratch, cudaStream_t stream) {
  run(job_of(how, shared), scratch, stream);
}

std::size_t scratch_bytes(const BlendBackward& how, Shared shared) { return scratch_bytes(job_of(how, shared)); }
void blend_backward(const BlendBackward& how, Shared shared, Scratch scratch, cudaStream_t stream) {
  run(job_of(how, shared), scratch, stream);
}

}  // namespace fastnuggets::poisson::cuda

// Forward: a block owns a tile of one channel of one grid. It collects the atoms that reach the tile, in ascending
// order, and writes each voxel once; most tiles have no atom and cost their zeros alone. Backward: a block owns one
// entry on one pose. Neither uses atomics, so results do not depend on scheduling.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "common/launch.cuh"
#include "voxelize/voxelize_cuda.h"
#include "voxelize/voxelize_math.h"

namespace fastnuggets::cuda {
namespace {

using std::int64_t;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

// Densities that share a kernel: products differ in their axis functions alone, and a sphere is a flat gaussian.
enum class Family { product, cut_gaussian, wave, molgrid, moleculekit };

// A density whose formulas in voxelize_math.h are those of the family.
template <Family F>
constexpr Density kRadial = F == Family::wave          ? Density::wave
                            : F == Family::molgrid     ? Density::molgrid
                            : F == Family::moleculekit ? Density::moleculekit
                                                       : Density::molvoxel;

template <class Body>
void for_family(Density density, Body body) {
  switch (density) {
    case Density::sphere:
    case Density::molvoxel:
      return body(std::integral_constant<Family, Family::cut_gaussian>());
    case Density::wave:
      return body(std::integral_constant<Family, Family::wave>());
    case Density::molgrid:
      return body(std::integral_constant<Family, Family::molgrid>());
    case Density::moleculekit:
      return body(std::integral_constant<Family, Family::moleculekit>());
    default:
      return body(std::integral_constant<Family, Family::product>());
  }
}

// ---- numbers

template <class T>
__device__ T with_tangent(Real<T> value, Real<T> tangent) {
  if constexpr (std::is_same_v<T, Real<T>>) {
    return value;
  } else {
    return T(value, tangent);
  }
}

// What a kernel on T is asked for: the value, or the derivative along the tangent.
template <class T>
__device__ Real<T> result(T x) {
  if constexpr (std::is_same_v<T, Real<T>>) {
    return x;
  } else {
    return x.d;
  }
}

template <class T>
__device__ bool is_zero(T x) {
  return value_of(x) == 0 && result(x) == 0;
}

template <class R>
__device__ R load(const void* data, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::float32:
      return R(static_cast<const float*>(data)[at]);
    case Dtype::float64:
      return R(static_cast<const double*>(data)[at]);
    case Dtype::float16:
      return R(__half2float(static_cast<const __half*>(data)[at]));
    default:
      return R(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]));
  }
}

template <class R>
__device__ void store(float* to, R x) {
  *to = float(x);
}
template <class R>
__device__ void store(double* to, R x) {
  *to = double(x);
}
template <class R>
__device__ void store(__half* to, R x) {
  *to = __float2half_rn(float(x));
}
template <class R>
__device__ void store(__nv_bfloat16* to, R x) {
  *to = __float2bfloat16_rn(float(x));
}

// Four neighbours at once, the first of them aligned to 16 bytes, or to 8 in half precision.
template <class R>
__device__ void store_quad(float* to, const R (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(float(x[0]), float(x[1]), float(x[2]), float(x[3]));
}
template <class R>
__device__ void store_quad(double* to, const R (&x)[4]) {
  reinterpret_cast<double2*>(to)[0] = make_double2(double(x[0]), double(x[1]));
  reinterpret_cast<double2*>(to)[1] = make_double2(double(x[2]), double(x[3]));
}
__device__ unsigned half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ unsigned bfloat16_bits(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
template <class R>
__device__ void store_quad(__half* to, const R (&x)[4]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(half_bits(float(x[0])) | half_bits(float(x[1])) << 16,
                                             half_bits(float(x[2])) | half_bits(float(x[3])) << 16);
}
template <class R>
__device__ void store_quad(__nv_bfloat16* to, const R (&x)[4]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(bfloat16_bits(float(x[0])) | bfloat16_bits(float(x[1])) << 16,
                                             bfloat16_bits(float(x[2])) | bfloat16_bits(float(x[3])) << 16);
}

template <class T>
T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

unsigned blocks_for(int64_t units, int64_t units_in_block) {
  const int64_t blocks = ceil_div(units, units_in_block);
  if (blocks > 0x7fffffff)
    throw std::runtime_error("fastnuggets: a grid of this size needs too many blocks of threads");
  return unsigned(blocks);
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// ---- entries set out on the grid, once for all blocks

// Voxels that an entry may reach; two 16-byte loads tell a block whether it is concerned.
struct alignas(16) Footprint {
  int first[3];
  int last[3];
  int channel;  // -1: the entry reaches no voxel, and its Placed is not set
  int unused;
};

template <class T>
struct Placed {
  double position[3];  // in the box, angstrom
  T weight;
  Shape<T> shape;
  Real<T> direction[3];  // tangent of the position
};

// Entry (n, j) on pose k is number (k * per_atom + j) * N + n, so that what a block looks through is contiguous.
// per_atom is 1 if an atom has one channel, C if it has all.
template <class T>
struct Entries {
  Footprint* footprints;
  Placed<T>* placed;
  double* sums;  // [count, kSums] of the backward
  const int64_t* ptr;
  int64_t N, K, C, per_atom;

  static constexpr int kSums = 6;  // position, weight, size, omega
  static constexpr std::size_t kBytes = sizeof(Footprint) + kSums * sizeof(double) + sizeof(Placed<T>);

  FN_HD int64_t count() const { return N * K * per_atom; }
  FN_HD int64_t first_of(int64_t k, int64_t c) const { return (k * per_atom + (per_atom == 1 ? 0 : c)) * N; }
};

template <class R>
int64_t entries_per_atom(const Molecules<R>& m) {
  return m.channel != nullptr ? 1 : m.C;
}

template <class T>
Entries<T> make_entries(const Molecules<Real<T>>& m, void* workspace) {
  Entries<T> e{static_cast<Footprint*>(workspace), nullptr, nullptr, m.ptr, m.N, m.K, m.C, entries_per_atom(m)};
  e.sums = reinterpret_cast<double*>(e.footprints + e.count());
  e.placed = reinterpret_cast<Placed<T>*>(e.sums + e.count() * Entries<T>::kSums);
  return e;
}

// The last segment that starts at or before i.
__device__ int64_t segment_of(const int64_t* ptr, int64_t segments, int64_t i) {
  int64_t low = 0, high = segments;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (ptr[middle] <= i ? low : high) = middle;
  }
  return low;
}

template <Density D, class T>
__device__ void place(const Grid& grid, T size, T omega, Placed<T>& placed, Footprint& footprint) {
  placed.shape = make_shape<D>(size, omega, grid.cutoff);
  for (int axis = 0; axis < 3; ++axis) {
    const Window w = window<D>(placed.position[axis], int(grid.shape[axis]), grid.spacing[axis], placed.shape.reach);
    footprint.first[axis] = w.first;
    footprint.last[axis] = w.last;
    if (w.first > w.last) footprint.channel = -1;
  }
}

template <class T>
__device__ void place(const Grid& grid, T size, T omega, Placed<T>& placed, Footprint& footprint) {
  switch (grid.density) {
    case Density::nearest:
      return place<Density::nearest>(grid, size, omega, placed, footprint);
    case Density::trilinear:
      return place<Density::trilinear>(grid, size, omega, placed, footprint);
    case Density::sphere:
      return place<Density::sphere>(grid, size, omega, placed, footprint);
    case Density::gaussian:
      return place<Density::gaussian>(grid, size, omega, placed, footprint);
    case Density::wave:
      return place<Density::wave>(grid, size, omega, placed, footprint);
    case Density::molgrid:
      return place<Density::molgrid>(grid, size, omega, placed, footprint);
    case Density::molvoxel:
      return place<Density::molvoxel>(grid, size, omega, placed, footprint);
    case Density::pyuul:
      return place<Density::pyuul>(grid, size, omega, placed, footprint);
    case Density::moleculekit:
      return place<Density::moleculekit>(grid, size, omega, placed, footprint);
  }
}

template <class R>
__device__ R tangent_at(const R* tangent, int64_t at) {
  return tangent == nullptr ? R(0) : tangent[at];
}

constexpr int kPlaceThreads = 128;

template <class T>
__global__ void __launch_bounds__(kPlaceThreads, 1)
    place_entries(const __grid_constant__ Molecules<Real<T>> m, const __grid_constant__ Tangent<Real<T>> tangent,
                  const __grid_constant__ Grid grid, const __grid_constant__ Entries<T> entries) {
  const int64_t e = int64_t(blockIdx.x) * kPlaceThreads + threadIdx.x;
  if (e >= entries.count()) return;
  const int64_t n = e % m.N, j = e / m.N % entries.per_atom, k = e / m.N / entries.per_atom;
  const int64_t c = m.channel != nullptr ? m.channel[n] : j;
  const bool sized = grid.density != Density::nearest && grid.density != Density::trilinear;
  // Whether a channel exists is checked by the caller if at all: here it must only do no harm.
  const bool exists = c >= 0 && c < m.C;
  const Real<T> size = !exists ? Real<T>(0) : sized ? entry(m.size, n, c) : Real<T>(1);
  Footprint footprint{{0, 0, 0}, {0, 0, 0}, -1, 0};
  if (size > 0) {
    const int64_t at = n * m.C + c;
    footprint.channel = int(c);
    Placed<T> placed;
    box_position(m, n, segment_of(m.ptr, m.B, n) * m.K + k, placed.position);
    for (int axis = 0; axis < 3; ++axis) placed.direction[axis] = tangent_at(tangent.coords, (n * m.K + k) * 3 + axis);
    placed.weight = with_tangent<T>(entry(m.weight, n, c), tangent_at(tangent.weight, at));
    place(grid, with_tangent<T>(size, tangent_at(tangent.size, at)),
          with_tangent<T>(entry(m.omega, n, c), tangent_at(tangent.omega, at)), placed, footprint);
    entries.placed[e] = placed;
  }
  entries.footprints[e] = footprint;
}

template <class T>
Entries<T> placed_entries(const CudaJob<T>& job) {
  const Entries<T> entries = make_entries<T>(job.m, job.workspace);
  FN_LAUNCH(place_entries<T>, blocks_for(entries.count(), kPlaceThreads), kPlaceThreads, 0, job.stream, job.m,
            job.tangent, job.grid, entries);
  return entries;
}

// ---- the densities, for one voxel

template <class T>
__device__ T offset(const Placed<T>& placed, const Grid& grid, int axis, int voxel) {
  const double center = (voxel - 0.5 * (int(grid.shape[axis]) - 1)) * grid.spacing[axis];
  return with_tangent<T>(Real<T>(placed.position[axis] - center), placed.direction[axis]);
}

template <class T>
__device__ T axis_value(const Grid& grid, int axis, T delta, const Shape<T>& shape) {
  const Real<T> h = Real<T>(grid.spacing[axis]);
  if (grid.density == Density::trilinear) return axis_value<Density::trilinear>(delta, shape, h);
  if (grid.density == Density::nearest) return axis_value<Density::nearest>(delta, shape, h);
  return axis_value<Density::gaussian>(delta, shape, h);
}

template <class T>
__device__ AxisSlope<T> axis_slope(const Grid& grid, int axis, T delta, const Shape<T>& shape) {
  const Real<T> h = Real<T>(grid.spacing[axis]);
  if (grid.density == Density::trilinear) return axis_slope<Density::trilinear>(delta, shape, h);
  if (grid.density == Density::nearest) return axis_slope<Density::nearest>(delta, shape, h);
  return axis_slope<Density::gaussian>(delta, shape, h);
}

// ---- collecting the atoms that reach a box of voxels

struct Box {
  int first[3], last[3];

  // An index known only at run time would move the box from registers to memory.
  __device__ int first_on(int axis) const { return axis == 0 ? first[0] : axis == 1 ? first[1] : first[2]; }
};

// Both halves at once: one after the other, each would wait for the memory.
__device__ Footprint load(const Footprint* footprint) {
  const int4 low = reinterpret_cast<const int4*>(footprint)[0], high = reinterpret_cast<const int4*>(footprint)[1];
  return {{low.x, low.y, low.z}, {low.w, high.x, high.y}, high.z, high.w};
}

__device__ bool reaches(const Footprint& f, int channel, const Box& box) {
  bool hit = f.channel == channel;
  for (int axis = 0; axis < 3; ++axis)
    hit = hit & (f.first[axis] <= box.last[axis]) & (f.last[axis] >= box.first[axis]);
  return hit;
}

template <int kThreads>
struct Hits {
  int warp_count[kThreads / kWarp];
  int index[kThreads];
};

// Of kThreads candidates, one a thread, those that hit, in ascending order; returns how many. A barrier for the block.
template <int kThreads>
__device__ int collect(Hits<kThreads>& hits, bool hit) {
  const int total = __syncthreads_count(hit);
  if (total == 0) return 0;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const unsigned votes = __ballot_sync(kAllLanes, hit);
  if (lane == 0) hits.warp_count[warp] = __popc(votes);
  __syncthreads();
  int before = 0;
  for (int w = 0; w < warp; ++w) before += hits.warp_count[w];
  if (hit) hits.index[before + __popc(votes & ((1u << lane) - 1))] = int(threadIdx.x);
  __syncthreads();
  return total;
}

// ---- forward

constexpr int kTileThreads = 256;
constexpr int kBatch = 8;  // atoms whose axis functions are in shared memory at a time
constexpr int kTilePlanes = 32;
constexpr int kTileRows = 8;
constexpr int kTileColumns = 128;
constexpr int kTileSlots = kTilePlanes + kTileRows + kTileColumns;

// A thread has so many groups of four voxels: many, to spread what a tile costs, but their sums must stay in registers.
template <class T>
constexpr int kQuads = 4;
template <>
constexpr int kQuads<float> = 5;
template <>
constexpr int kQuads<Dual<double>> = 2;

// Blocks that a multiprocessor should hold, so that some write while others look for their atoms.
template <class T>
constexpr int kTileBlocks = 2;
template <>
constexpr int kTileBlocks<float> = 3;
template <>
constexpr int kTileBlocks<Dual<double>> = 1;

// Division of a number below 2^31 by one multiplication. A block finds its place by a chain of divisions, which done
// the plain way would cost an empty tile more than its zeros.
struct Divisor {
  unsigned divisor, multiplier, shift;

  explicit Divisor(int64_t d) : divisor(unsigned(std::max<int64_t>(d, 1))), shift(31) {
    while ((std::uint64_t(1) << (shift - 31)) < divisor) ++shift;
    multiplier = unsigned(((std::uint64_t(1) << shift) + divisor - 1) / divisor);
  }
  __device__ unsigned operator()(unsigned n) const { return unsigned((std::uint64_t(n) * multiplier) >> shift); }
  // Leaves n / divisor in n and returns the remainder.
  __device__ unsigned split(unsigned& n) const {
    const unsigned whole = n;
    n = (*this)(whole);
    return whole - n * divisor;
  }
};

// How the grid is cut. The four voxels of a group are neighbours in a row, so that one store writes them, or, where
// rows are not aligned, `quads` apart, so that neighbouring threads write neighbouring voxels.
struct Tiling {
  int extent[3];  // planes, rows, columns of a tile
  int quads;      // groups in a row of a tile
  bool adjacent;
  unsigned plane_stride, row_stride;  // in the output; an offset in a tile has 32 bits
  Divisor by_quads, by_rows;          // of a group's number in the tile
  Divisor by_count[3];                // of a tile's number: tiles on each axis
  Divisor by_channels, by_poses;      // of a volume's number: C; of a grid's: K

  __device__ int column(int quad, int i) const { return adjacent ? 4 * quad + i : quad + i * quads; }
  __device__ int slots() const { return extent[0] + extent[1] + extent[2]; }
  int64_t tiles() const { return int64_t(by_count[0].divisor) * by_count[1].divisor * by_count[2].divisor; }
};

// The size of parts of at most `most`, as equal as they come.
int part_of(int64_t n, int64_t most) { return int(ceil_div(n, ceil_div(n, most))); }

Tiling make_tiling(const Grid& grid, int64_t C, int64_t K, int quads_in_tile, bool adjacent, bool in_order) {
  const int quads = part_of(ceil_div<int64_t>(grid.shape[2], 4), kTileColumns / 4);
  const bool whole_rows = 4 * quads >= grid.shape[2];
  const int64_t most_rows = in_order ? (whole_rows ? kTileRows + kTilePlanes - 1 : 1) : kTileRows;
  const auto fitting = [](int64_t stride) { return std::max<int64_t>(1, 0x7fffffff / stride); };
  const int rows =
      part_of(grid.shape[1], std::min<int64_t>({most_rows, quads_in_tile / quads, fitting(grid.shape[2])}));
  const int64_t most_planes = in_order ? 1 : kTilePlanes;
  const int64_t plane = grid.shape[1] * grid.shape[2];
  const int planes =
      part_of(grid.shape[0], std::min<int64_t>({most_planes, quads_in_tile / (quads * rows), fitting(plane)}));
  const auto count = [](int64_t n, int part) { return Divisor(ceil_div<int64_t>(n, part)); };
  return {{planes, rows, 4 * quads},
          quads,
          adjacent,
          unsigned(plane),
          unsigned(grid.shape[2]),
          Divisor(quads),
          Divisor(rows),
          {count(grid.shape[0], planes), count(grid.shape[1], rows), count(grid.shape[2], 4 * quads)},
          Divisor(C),
          Divisor(K)};
}

struct Tile {
  int molecule, pose, grid, channel;
  Box box;                    // voxels beyond the grid included
  int planes, rows, columns;  // of the tile or the rest of the grid
  int64_t origin;             // place of the first voxel in the output
};

__device__ Tile tile_of(const Tiling& tiling, const Grid& grid, unsigned block) {
  Tile t;
  unsigned rest = block;
  for (int axis = 2; axis >= 0; --axis) {
    t.box.first[axis] = int(tiling.by_count[axis].split(rest)) * tiling.extent[axis];
    t.box.last[axis] = t.box.first[axis] + tiling.extent[axis] - 1;
  }
  t.planes = min(tiling.extent[0], int(grid.shape[0]) - t.box.first[0]);
  t.rows = min(tiling.extent[1], int(grid.shape[1]) - t.box.first[1]);
  t.columns = min(tiling.extent[2], int(grid.shape[2]) - t.box.first[2]);
  t.origin =
      ((rest * grid.shape[0] + t.box.first[0]) * grid.shape[1] + t.box.first[1]) * grid.shape[2] + t.box.first[2];
  t.channel = int(tiling.by_channels.split(rest));
  t.grid = int(rest);
  t.pose = int(tiling.by_poses.split(rest));
  t.molecule = int(rest);
  return t;
}

// Where in the tile a thread's group is, in one register; a plane beyond the tile's: there is no such group.
class Place {
 public:
  __device__ Place(const Tiling& tiling, int i) {
    unsigned rest = unsigned(i * kTileThreads) + threadIdx.x;
    const unsigned quad = tiling.by_quads.split(rest), row = tiling.by_rows.split(rest);
    packed_ = rest << 16 | row << 8 | quad;
  }
  __device__ int plane() const { return int(packed_ >> 16); }
  __device__ int row() const { return int(packed_ >> 8 & 255); }
  __device__ int quad() const { return int(packed_ & 255); }
  __device__ bool is_in(const Tile& t) const { return plane() < t.planes && row() < t.rows; }
  __device__ unsigned offset(const Tiling& tiling) const {
    return unsigned(plane()) * tiling.plane_stride + unsigned(row()) * tiling.row_stride;
  }

 private:
  unsigned packed_;
};
static_assert(kTileRows + kTilePlanes <= 256 && kTileColumns / 4 <= 256);

// The groups of one thread: their places and what atoms add to their voxels.
template <class T>
struct Quads {
  Place place[kQuads<T>];
  T sum[kQuads<T>][4] = {};

  __device__ explicit Quads(const Tiling& tiling) : Quads(tiling, std::make_integer_sequence<int, kQuads<T>>()) {}

 private:
  template <int... i>
  __device__ Quads(const Tiling& tiling, std::integer_sequence<int, i...>) : place{Place(tiling, i)...} {}
};

template <class T>
struct TileShared {
  Hits<kTileThreads> hits;
  Placed<T> placed[kBatch];
  T value[kBatch][kTileSlots];   // of the axis functions; zero outside of the footprint
  T square[kBatch][kTileSlots];  // of the offsets; infinite outside of the footprint
};

// Slots are planes, then rows, then columns in an order that has neighbouring threads read neighbouring slots.
template <Family F, class T>
__device__ void fill_tables(TileShared<T>& s, const Entries<T>& entries, int64_t first, int batch, int count,
                            const Grid& grid, const Tiling& tiling, const Box& box) {
  for (int i = int(threadIdx.x); i < count * tiling.slots(); i += kTileThreads) {
    const int a = i / tiling.slots();
    int slot = i % tiling.slots(), axis = 0, at = slot;
    if (at >= tiling.extent[0]) at -= tiling.extent[axis++];
    if (axis == 1 && at >= tiling.extent[1]) at -= tiling.extent[axis++];
    const int voxel = box.first_on(axis) + (axis == 2 ? tiling.column(at % tiling.quads, at / tiling.quads) : at);
    const int64_t e = first + s.hits.index[batch + a];
    const Footprint& footprint = entries.footprints[e];
    const Placed<T>& placed = entries.placed[e];
    const bool inside = voxel >= footprint.first[axis] && voxel <= footprint.last[axis];
    const T delta = offset(placed, grid, axis, voxel);
    T value = axis_value(grid, axis, delta, placed.shape);
    if (F == Family::product && axis == 0) value *= placed.weight;
    s.value[a][slot] = inside ? value : T(Real<T>(0));
    if (F != Family::product) s.square[a][slot] = inside ? delta * delta : T(Real<T>(INFINITY));
  }
  if (F != Family::product && int(threadIdx.x) < count)
    s.placed[threadIdx.x] = entries.placed[first + s.hits.index[batch + threadIdx.x]];
}

template <Family F, class T>
__device__ void add_atom(const TileShared<T>& s, int a, Combine rule, const Tiling& tiling, const Place& place,
                         T (&sum)[4]) {
  const T* value = s.value[a];
  const T* square = s.square[a];
  const int row = tiling.extent[0] + place.row(), column = tiling.extent[0] + tiling.extent[1] + place.quad();
  const T envelope = value[place.plane()] * value[row];
  if constexpr (F == Family::product) {
    if (is_zero(envelope)) return;
    if (rule == Combine::sum) {
      for (int i = 0; i < 4; ++i) sum[i] += envelope * value[column + i * tiling.quads];
    } else {
      for (int i = 0; i < 4; ++i) sum[i] = combined(rule, sum[i], envelope * value[column + i * tiling.quads]);
    }
  } else {
    const Placed<T>& placed = s.placed[a];
    const T in_plane = square[place.plane()] + square[row];
    if (value_of(in_plane) > placed.shape.reach_squared) return;
    for (int i = 0; i < 4; ++i) {
      const T q = in_plane + square[column + i * tiling.quads];
      if (value_of(q) > placed.shape.reach_squared) continue;
      const T gauss = envelope * value[column + i * tiling.quads];
      const T atom = placed.weight * radial_value<kRadial<F>>(q, gauss, placed.shape);
      sum[i] = combined(rule, sum[i], atom);
    }
  }
}

template <class T>
struct ForwardJob {
  Entries<T> entries;
  Grid grid;
  Tiling tiling;
};

// Whether any atom reaches the tile: mostly none does, and then nothing is set up for them.
template <class T>
__device__ bool is_reached(const ForwardJob<T>& job, const Tile& tile) {
  const int64_t end = job.entries.ptr[tile.molecule + 1];
  const Footprint* footprints = job.entries.footprints + job.entries.first_of(tile.pose, tile.channel);
  bool reached = false;
#pragma unroll 1
  for (int64_t n = job.entries.ptr[tile.molecule] + threadIdx.x; n < end; n += kTileThreads)
    reached = reached | reaches(load(footprints + n), tile.channel, tile.box);
  return __syncthreads_count(reached) > 0;
}

template <Family F, class T>
__device__ void add_atoms(TileShared<T>& s, const ForwardJob<T>& job, const Tile& tile, Quads<T>& quads) {
  const int64_t begin = job.entries.ptr[tile.molecule], end = job.entries.ptr[tile.molecule + 1];
  const int64_t entries = job.entries.first_of(tile.pose, tile.channel);
  for (int64_t n = begin; n < end; n += kTileThreads) {
    const int64_t mine = n + threadIdx.x;
    const int hits =
        collect(s.hits, mine < end && reaches(load(job.entries.footprints + entries + mine), tile.channel, tile.box));
    for (int batch = 0; batch < hits; batch += kBatch) {
      const int count = min(hits - batch, kBatch);
      fill_tables<F>(s, job.entries, entries + n, batch, count, job.grid, job.tiling, tile.box);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kQuads<T>; ++i) {
        if (quads.place[i].plane() >= job.tiling.extent[0]) break;
#pragma unroll 1
        for (int a = 0; a < count; ++a) add_atom<F>(s, a, job.grid.combine, job.tiling, quads.place[i], quads.sum[i]);
      }
      __syncthreads();
    }
  }
}

template <class T, class Element>
__device__ void write_tile(const Tiling& tiling, const Tile& tile, const Quads<T>& quads, void* out) {
  Element* const to = static_cast<Element*>(out) + tile.origin;
#pragma unroll
  for (int i = 0; i < kQuads<T>; ++i) {
    const Place place = quads.place[i];
    if (!place.is_in(tile)) continue;
    const T(&sum)[4] = quads.sum[i];
    const Real<T> values[4] = {result(sum[0]), result(sum[1]), result(sum[2]), result(sum[3])};
    if (tiling.adjacent) {
      if (4 * place.quad() < tile.columns) store_quad(to + (place.offset(tiling) + 4u * place.quad()), values);
      continue;
    }
    for (int j = 0; j < 4; ++j) {
      const int column = tiling.column(place.quad(), j);
      if (column < tile.columns) store(to + (place.offset(tiling) + unsigned(column)), values[j]);
    }
  }
}

template <Family F, class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T>)
    voxelize_tiles(const __grid_constant__ ForwardJob<T> job, void* out, Dtype dtype) {
  FN_SHARED(TileShared<T>, shared);
  const Tile tile = tile_of(job.tiling, job.grid, blockIdx.x);
  Quads<T> quads(job.tiling);
  if (is_reached(job, tile)) add_atoms<F>(shared, job, tile, quads);
  switch (dtype) {
    case Dtype::float32:
      return write_tile<T, float>(job.tiling, tile, quads, out);
    case Dtype::float64:
      return write_tile<T, double>(job.tiling, tile, quads, out);
    case Dtype::float16:
      return write_tile<T, __half>(job.tiling, tile, quads, out);
    default:
      return write_tile<T, __nv_bfloat16>(job.tiling, tile, quads, out);
  }
}

// Of each thread's `mine`, the sum over the threads before it; `total` is the block's. A barrier for the block.
__device__ int64_t sum_before(int (&warp_sums)[kTileThreads / kWarp], int mine, int& total) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  int sum = mine;
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += below;
  }
  __syncthreads();
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  int before = sum - mine;
  total = 0;
  for (int w = 0; w < kTileThreads / kWarp; ++w) {
    before += w < warp ? warp_sums[w] : 0;
    total += warp_sums[w];
  }
  return before;
}

struct SparseOutput {
  int64_t* counts;        // [tiles]; null: write
  const int64_t* before;  // [tiles] filled voxels of earlier tiles
  int64_t total;
  int64_t* places;  // [5, total]
  void* values;     // [total]
};

template <Family F, class R>
__global__ void __launch_bounds__(kTileThreads, 1)
    voxelize_sparse_tiles(const __grid_constant__ ForwardJob<R> job, const __grid_constant__ SparseOutput out) {
  FN_SHARED(TileShared<R>, shared);
  FN_SHARED(int[kTileThreads / kWarp], warp_sums);
  const Tile tile = tile_of(job.tiling, job.grid, blockIdx.x);
  Quads<R> quads(job.tiling);
  if (is_reached(job, tile)) add_atoms<F>(shared, job, tile, quads);
  int64_t written = out.counts == nullptr ? out.before[blockIdx.x] : 0;
#pragma unroll
  for (int i = 0; i < kQuads<R>; ++i) {
    const Place place = quads.place[i];
    const R(&sum)[4] = quads.sum[i];
    const auto filled = [&](int j) {
      return place.is_in(tile) && 4 * place.quad() + j < tile.columns && sum[j] != R(0);
    };
    int total;
    int64_t at = written + sum_before(warp_sums, filled(0) + filled(1) + filled(2) + filled(3), total);
    written += total;
    for (int j = 0; j < 4; ++j) {
      if (out.counts != nullptr || !filled(j)) continue;
      const int64_t voxel[5] = {tile.grid, tile.channel, tile.box.first[0] + place.plane(),
                                tile.box.first[1] + place.row(), tile.box.first[2] + 4 * place.quad() + j};
      for (int axis = 0; axis < 5; ++axis) out.places[axis * out.total + at] = voxel[axis];
      static_cast<R*>(out.values)[at++] = sum[j];
    }
  }
  if (out.counts != nullptr && threadIdx.x == 0) out.counts[blockIdx.x] = written;
}

// ---- backward

constexpr int kAtomThreads = 128;
// Voxels that a block reads at a time, one a thread: in float, rows of 8 are whole memory sectors.
constexpr int kBrickD = 4, kBrickH = 4, kBrickW = 8;
static_assert(kBrickD * kBrickH * kBrickW == kAtomThreads);
constexpr int kSpan = 32;  // voxels on an axis for which functions are held in shared memory

// What a voxel takes from one axis: of a product AxisSlope's members, else offset, its square, the gaussian factor.
template <class T>
struct AxisTerms {
  T a, b, c;
};

template <class T>
struct AtomShared {
  Hits<kAtomThreads> hits;
  Placed<T> placed;
  AxisTerms<T> terms[3][kSpan];
  double warp_sums[kAtomThreads / kWarp][Entries<T>::kSums];
};

template <class T>
struct BackwardJob {
  Entries<T> entries;
  Grid grid;
  const void* gradient;
  Dtype dtype;
};

template <Family F, class T>
__device__ AxisTerms<T> axis_terms(const Grid& grid, const Placed<T>& placed, int axis, int voxel) {
  const T delta = offset(placed, grid, axis, voxel);
  if constexpr (F == Family::product) {
    const AxisSlope<T> s = axis_slope(grid, axis, delta, placed.shape);
    return {s.value, s.position, s.size};
  } else {
    return {delta, delta * delta, axis_value(grid, axis, delta, placed.shape)};
  }
}

// The entry's density at a voxel of its footprint, times its weight.
template <Family F, class T>
__device__ T density_of(const AxisTerms<T> (&t)[3], const Placed<T>& placed) {
  if constexpr (F == Family::product) {
    return placed.weight * (t[0].a * t[1].a * t[2].a);
  } else {
    const T q = t[0].b + t[1].b + t[2].b;
    if (value_of(q) > placed.shape.reach_squared) return T(Real<T>(0));
    return placed.weight * radial_value<kRadial<F>>(q, t[0].c * t[1].c * t[2].c, placed.shape);
  }
}

__device__ bool holds(const Footprint& f, const int (&voxel)[3]) {
  bool inside = true;
  for (int axis = 0; axis < 3; ++axis) inside = inside && voxel[axis] >= f.first[axis] && voxel[axis] <= f.last[axis];
  return inside;
}

// What the other atoms of the channel leave of a change of this one's value: where atoms add up, all of it.
template <Family F, class T>
__device__ T left_by_others(Hits<kAtomThreads>& hits, const BackwardJob<T>& job, int64_t first, int64_t molecule,
                            int64_t own, const Box& brick, const int (&voxel)[3], bool inside, T value) {
  const Combine rule = job.grid.combine;
  T factor = factor_of_own(rule, value);
  const int64_t begin = job.entries.ptr[molecule], end = job.entries.ptr[molecule + 1];
  const int channel = job.entries.footprints[first + own].channel;
  for (int64_t n = begin; n < end; n += kAtomThreads) {
    const int64_t mine = n + threadIdx.x;
    const bool hit = mine < end && mine != own && reaches(load(job.entries.footprints + first + mine), channel, brick);
    const int count = collect(hits, hit);
    for (int i = 0; i < count; ++i) {
      const int64_t other = n + hits.index[i];
      if (!inside || !holds(job.entries.footprints[first + other], voxel)) continue;
      const Placed<T>& placed = job.entries.placed[first + other];
      const AxisTerms<T> terms[3] = {axis_terms<F>(job.grid, placed, 0, voxel[0]),
                                     axis_terms<F>(job.grid, placed, 1, voxel[1]),
                                     axis_terms<F>(job.grid, placed, 2, voxel[2])};
      factor = factor_of_other(rule, factor, value, density_of<F>(terms, placed), other < own);
    }
    __syncthreads();
  }
  return factor;
}

// sums += gradient * derivative of the density; the weight is left to the end, where it is wanted.
template <Family F, class T>
__device__ void add_derivatives(const AxisTerms<T> (&t)[3], const Placed<T>& placed, T gradient,
                                T (&sums)[Entries<T>::kSums]) {
  if constexpr (F == Family::product) {
    const T xy = t[0].a * t[1].a, z = gradient * t[2].a;
    sums[0] += t[0].b * t[1].a * z;
    sums[1] += t[0].a * t[1].b * z;
    sums[2] += gradient * (xy * t[2].b);
    sums[3] += xy * z;
    sums[4] += (t[0].c * t[1].a + t[0].a * t[1].c) * z + gradient * (xy * t[2].c);
  } else {
    const T q = t[0].b + t[1].b + t[2].b;
    if (value_of(q) > placed.shape.reach_squared) return;
    const RadialSlope<T> s = radial_slope<kRadial<F>>(q, t[0].c * t[1].c * t[2].c, placed.shape);
    const T by_q = gradient * s.q;
    for (int axis = 0; axis < 3; ++axis) sums[axis] += (by_q + by_q) * t[axis].a;
    sums[3] += gradient * s.value;
    sums[4] += gradient * s.size;
    sums[5] += gradient * s.omega;
  }
}

// What adds up over the bricks of one layer, in T, joins the total in double: long sums of floats lose digits.
template <class T>
__device__ void add_layer(const T (&layer)[Entries<T>::kSums], T weight, double (&total)[Entries<T>::kSums]) {
  for (int i = 0; i < Entries<T>::kSums; ++i) total[i] += double(result(i == 3 ? layer[i] : weight * layer[i]));
}

template <class T>
__device__ void write_block_sum(AtomShared<T>& s, double (&total)[Entries<T>::kSums], double* to) {
  constexpr int kSums = Entries<T>::kSums;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    for (int step = kWarp / 2; step > 0; step /= 2) total[i] += __shfl_down_sync(kAllLanes, total[i], step);
    if (lane == 0) s.warp_sums[warp][i] = total[i];
  }
  __syncthreads();
  if (int(threadIdx.x) >= kSums) return;
  double sum = 0;
  for (int w = 0; w < kAtomThreads / kWarp; ++w) sum += s.warp_sums[w][threadIdx.x];
  to[threadIdx.x] = sum;
}

// Bricks of a part of the footprint for which the axis functions are in shared memory.
template <Family F, class T>
__device__ void add_span(AtomShared<T>& s, const BackwardJob<T>& job, int64_t first, int64_t molecule, int64_t own,
                         int64_t volume, const Footprint& footprint, const Box& span,
                         double (&total)[Entries<T>::kSums]) {
  const int t = int(threadIdx.x);
  const int within[3] = {t / (kBrickH * kBrickW), t / kBrickW % kBrickH, t % kBrickW};
  const int64_t H = job.grid.shape[1], W = job.grid.shape[2];
  Box brick;
  for (brick.first[0] = span.first[0]; brick.first[0] <= span.last[0]; brick.first[0] += kBrickD) {
    T layer[Entries<T>::kSums] = {};
    for (brick.first[1] = span.first[1]; brick.first[1] <= span.last[1]; brick.first[1] += kBrickH) {
      for (brick.first[2] = span.first[2]; brick.first[2] <= span.last[2]; brick.first[2] += kBrickW) {
        int voxel[3];
        for (int axis = 0; axis < 3; ++axis) {
          brick.last[axis] = brick.first[axis] + (axis == 2 ? kBrickW : axis == 1 ? kBrickH : kBrickD) - 1;
          voxel[axis] = brick.first[axis] + within[axis];
        }
        const bool inside = holds(footprint, voxel);
        if (job.grid.combine == Combine::sum && !inside) continue;
        const AxisTerms<T> terms[3] = {s.terms[0][voxel[0] - span.first[0]], s.terms[1][voxel[1] - span.first[1]],
                                       s.terms[2][voxel[2] - span.first[2]]};
        T factor(Real<T>(1));
        if (job.grid.combine != Combine::sum) {
          factor = left_by_others<F>(s.hits, job, first, molecule, own, brick, voxel, inside,
                                     density_of<F>(terms, s.placed));
          if (!inside) continue;
        }
        const int64_t at = ((volume * job.grid.shape[0] + voxel[0]) * H + voxel[1]) * W + voxel[2];
        add_derivatives<F>(terms, s.placed, factor * T(load<Real<T>>(job.gradient, job.dtype, at)), layer);
      }
    }
    add_layer(layer, s.placed.weight, total);
  }
}

template <Family F, class T>
__global__ void __launch_bounds__(kAtomThreads, 1)
    voxelize_backward_entries(const __grid_constant__ BackwardJob<T> job, int64_t molecules) {
  FN_SHARED(AtomShared<T>, s);
  const Entries<T>& entries = job.entries;
  const int64_t e = blockIdx.x, own = e % entries.N, k = e / entries.N / entries.per_atom;
  double total[Entries<T>::kSums] = {};
  const Footprint footprint = entries.footprints[e];
  if (footprint.channel >= 0) {
    const int64_t molecule = segment_of(entries.ptr, molecules, own);
    const int64_t volume = (molecule * entries.K + k) * entries.C + footprint.channel;
    if (threadIdx.x == 0) s.placed = entries.placed[e];
    Box span;
    for (span.first[0] = footprint.first[0]; span.first[0] <= footprint.last[0]; span.first[0] += kSpan) {
      for (span.first[1] = footprint.first[1]; span.first[1] <= footprint.last[1]; span.first[1] += kSpan) {
        // Rows start at a sector's first voxel where the grid's do.
        for (span.first[2] = footprint.first[2] / kBrickW * kBrickW; span.first[2] <= footprint.last[2];
             span.first[2] += kSpan) {
          for (int axis = 0; axis < 3; ++axis) {
            const int last = span.first[axis] + kSpan - 1;
            span.last[axis] = last < footprint.last[axis] ? last : footprint.last[axis];
          }
          __syncthreads();
          for (int i = int(threadIdx.x); i < 3 * kSpan; i += kAtomThreads)
            s.terms[i / kSpan][i % kSpan] =
                axis_terms<F>(job.grid, s.placed, i / kSpan, span.first_on(i / kSpan) + i % kSpan);
          __syncthreads();
          add_span<F>(s, job, e - own, molecule, own, volume, footprint, span, total);
        }
      }
    }
  }
  write_block_sum(s, total, entries.sums + e * Entries<T>::kSums);
}

// An atom's position has the gradients of its channels, an entry those of its poses.
template <class T>
__global__ void __launch_bounds__(kPlaceThreads)
    gather_gradients(const __grid_constant__ Entries<T> entries, const int64_t* channel,
                     const __grid_constant__ Gradients<Real<T>> to) {
  using R = Real<T>;
  constexpr int kSums = Entries<T>::kSums;
  const int64_t i = int64_t(blockIdx.x) * kPlaceThreads + threadIdx.x;
  const int64_t n = i % entries.N, rest = i / entries.N;
  if (to.coords != nullptr && rest < entries.K) {
    double sum[3] = {};
    for (int64_t j = 0; j < entries.per_atom; ++j) {
      const double* from = entries.sums + ((rest * entries.per_atom + j) * entries.N + n) * kSums;
      for (int axis = 0; axis < 3; ++axis) sum[axis] += from[axis];
    }
    for (int axis = 0; axis < 3; ++axis) to.coords[(n * entries.K + rest) * 3 + axis] = R(sum[axis]);
  }
  if (rest >= entries.per_atom) return;
  const int64_t c = channel != nullptr ? channel[n] : rest;
  if (c < 0 || c >= entries.C) return;
  double sum[3] = {};
  for (int64_t k = 0; k < entries.K; ++k) {
    const double* from = entries.sums + ((k * entries.per_atom + rest) * entries.N + n) * kSums + 3;
    for (int j = 0; j < 3; ++j) sum[j] += from[j];
  }
  if (to.weight != nullptr) to.weight[n * entries.C + c] = R(sum[0]);
  if (to.size != nullptr) to.size[n * entries.C + c] = R(sum[1]);
  if (to.omega != nullptr) to.omega[n * entries.C + c] = R(sum[2]);
}

// ---- sums over the atoms of a molecule, and back

constexpr int kSegmentThreads = 128;

// A warp owns one sum.
template <class R>
__global__ void __launch_bounds__(kSegmentThreads)
    sum_segments(const R* x, const int64_t* ptr, int64_t segments, int64_t width, R* out) {
  const int64_t i = (int64_t(blockIdx.x) * kSegmentThreads + threadIdx.x) / kWarp;
  if (i >= segments * width) return;
  const int64_t s = i / width, j = i % width;
  double sum = 0;
  for (int64_t n = ptr[s] + threadIdx.x % kWarp; n < ptr[s + 1]; n += kWarp) sum += double(x[n * width + j]);
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
  if (threadIdx.x % kWarp == 0) out[i] = R(sum);
}

template <class R>
__global__ void __launch_bounds__(kSegmentThreads)
    expand_segments(const R* y, const int64_t* ptr, int64_t segments, int64_t N, int64_t width, R* out) {
  const int64_t i = int64_t(blockIdx.x) * kSegmentThreads + threadIdx.x;
  if (i < N * width) out[i] = y[segment_of(ptr, segments, i / width) * width + i % width];
}

Tiling sparse_tiling(const Grid& grid, int64_t C, int64_t K) {
  return make_tiling(grid, C, K, std::min(kQuads<float>, kQuads<double>) * kTileThreads, true, true);
}

template <class R>
void launch_sparse(const CudaJob<R>& job, const SparseOutput& out) {
  if (job.grid.voxels() == 0) return;
  const ForwardJob<R> forward{placed_entries(job), job.grid, sparse_tiling(job.grid, job.m.C, job.m.K)};
  const unsigned blocks = blocks_for(job.m.B * job.m.K * job.m.C * forward.tiling.tiles(), 1);
  for_family(job.grid.density, [&](auto family) {
    FN_LAUNCH((voxelize_sparse_tiles<decltype(family)::value, R>), blocks, kTileThreads, 0, job.stream, forward, out);
  });
}

}  // namespace

template <class T>
std::size_t workspace_bytes(const Molecules<Real<T>>& m) {
  return std::size_t(m.N * m.K * entries_per_atom(m)) * Entries<T>::kBytes;
}

template <class T>
void voxelize_forward(const CudaJob<T>& job, void* out, Dtype dtype) {
  if (job.grid.voxels() == 0) return;
  const bool aligned = job.grid.shape[2] % 4 == 0 &&
                       reinterpret_cast<std::uintptr_t>(out) % std::min<int64_t>(16, 4 * bytes_of(dtype)) == 0;
  const ForwardJob<T> forward{placed_entries(job), job.grid,
                              make_tiling(job.grid, job.m.C, job.m.K, kQuads<T> * kTileThreads, aligned, false)};
  const unsigned blocks = blocks_for(job.m.B * job.m.K * job.m.C * forward.tiling.tiles(), 1);
  for_family(job.grid.density, [&](auto family) {
    FN_LAUNCH((voxelize_tiles<decltype(family)::value, T>), blocks, kTileThreads, 0, job.stream, forward, out, dtype);
  });
}

template <class T>
void voxelize_backward(const CudaJob<T>& job, const void* grad, Dtype dtype, const Gradients<Real<T>>& to) {
  const BackwardJob<T> backward{placed_entries(job), job.grid, grad, dtype};
  const unsigned blocks = blocks_for(backward.entries.count(), 1);
  for_family(job.grid.density, [&](auto family) {
    FN_LAUNCH((voxelize_backward_entries<decltype(family)::value, T>), blocks, kAtomThreads, 0, job.stream, backward,
              job.m.B);
  });
  const int64_t items = job.m.N * std::max(job.m.K, backward.entries.per_atom);
  FN_LAUNCH(gather_gradients<T>, blocks_for(items, kPlaceThreads), kPlaceThreads, 0, job.stream, backward.entries,
            job.m.channel, to);
}

std::int64_t sparse_tiles(std::int64_t grids, std::int64_t channels, const Grid& grid) {
  return grid.voxels() == 0 ? 0 : grids * channels * sparse_tiling(grid, channels, 1).tiles();
}

template <class R>
void voxelize_sparse_count(const CudaJob<R>& job, std::int64_t* counts) {
  launch_sparse(job, {counts, nullptr, 0, nullptr, nullptr});
}

template <class R>
void voxelize_sparse_write(const CudaJob<R>& job, const std::int64_t* before, std::int64_t total, std::int64_t* places,
                           R* values) {
  launch_sparse(job, {nullptr, before, total, places, values});
}

template <class R>
void segment_sum(const R* x, const std::int64_t* ptr, std::int64_t segments, std::int64_t width, R* out,
                 cudaStream_t stream) {
  FN_LAUNCH(sum_segments<R>, blocks_for(segments * width * kWarp, kSegmentThreads), kSegmentThreads, 0, stream, x, ptr,
            segments, width, out);
}

template <class R>
void segment_expand(const R* y, const std::int64_t* ptr, std::int64_t segments, std::int64_t N, std::int64_t width,
                    R* out, cudaStream_t stream) {
  FN_LAUNCH(expand_segments<R>, blocks_for(N * width, kSegmentThreads), kSegmentThreads, 0, stream, y, ptr, segments, N,
            width, out);
}

#define FN_INSTANTIATE(T)                                             \
  template std::size_t workspace_bytes<T>(const Molecules<Real<T>>&); \
  template void voxelize_forward<T>(const CudaJob<T>&, void*, Dtype); \
  template void voxelize_backward<T>(const CudaJob<T>&, const void*, Dtype, const Gradients<Real<T>>&);
FN_INSTANTIATE(float)
FN_INSTANTIATE(double)
FN_INSTANTIATE(Dual<float>)
FN_INSTANTIATE(Dual<double>)
#undef FN_INSTANTIATE

#define FN_INSTANTIATE(R)                                                                                          \
  template void voxelize_sparse_count<R>(const CudaJob<R>&, std::int64_t*);                                        \
  template void voxelize_sparse_write<R>(const CudaJob<R>&, const std::int64_t*, std::int64_t, std::int64_t*, R*); \
  template void segment_sum<R>(const R*, const std::int64_t*, std::int64_t, std::int64_t, R*, cudaStream_t);       \
  template void segment_expand<R>(const R*, const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, R*,     \
                                  cudaStream_t);
FN_INSTANTIATE(float)
FN_INSTANTIATE(double)
#undef FN_INSTANTIATE

}  // namespace fastnuggets::cuda

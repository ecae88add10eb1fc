// The levels of one object on the CPU: how rows lie in memory, which parts of a row are alike, and the matrices.
//
// A row is kept as its even columns (half 0), then its odd ones (half 1): neighbours of a colour's points are then
// consecutive, whatever the level. A block is kLanes points of each half, so 2 kLanes columns. A row is a list of runs
// of blocks: of none active, of inner ones, which have the level's own stencil, and of others, whose stencils are
// stored. Stencils are stored where a run or the next level's matrix reads them, and nowhere else.
#pragma once

// What takes or gives a vector is always inlined: there is no call whose convention could change.
#pragma GCC diagnostic ignored "-Wpsabi"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "blend/poisson_math.h"
#include "common/cpu.h"

#define FN_BODY inline __attribute__((always_inline))
#define FN_INLINE __attribute__((always_inline))

namespace fastnuggets::poisson {

using Index = std::int64_t;

// F::run(...) compiled for what the processor has. A function of its own for each, as inlined into their callers these
// would take minutes to compile.
template <class F, class... A>
__attribute__((noinline)) void run_generic(A... a) {
  F::run(a...);
}
template <class F, class... A>
FN_TARGET_AVX2 __attribute__((noinline)) void run_avx2(A... a) {
  F::run(a...);
}
template <class F, class... A>
FN_BODY void run(A... a) {
  simd() == Simd::generic ? run_generic<F>(a...) : run_avx2<F>(a...);
}

constexpr int kLanes = 8;
constexpr int kColumns = 2 * kLanes;  // of a block

template <class T>
struct Lanes {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T>
using Vector = typename Lanes<T>::type;

template <class T>
FN_BODY Vector<T> load(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
FN_BODY void store(T* to, Vector<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// a0 b0 a1 b1 ... and back.
template <class T>
using Places = Vector<std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>>;
template <class T>
FN_BODY void interleave(Vector<T> even, Vector<T> odd, T* to) {
  store<T>(to, __builtin_shuffle(even, odd, Places<T>{0, 8, 1, 9, 2, 10, 3, 11}));
  store<T>(to + kLanes, __builtin_shuffle(even, odd, Places<T>{4, 12, 5, 13, 6, 14, 7, 15}));
}
template <class T>
FN_BODY void split(Vector<T> first, Vector<T> second, T* even, T* odd) {
  store<T>(even, __builtin_shuffle(first, second, Places<T>{0, 2, 4, 6, 8, 10, 12, 14}));
  store<T>(odd, __builtin_shuffle(first, second, Places<T>{1, 3, 5, 7, 9, 11, 13, 15}));
}

// Memory of a thread that the next call uses again: fresh pages would cost more than the solution.
class Pool {
 public:
  template <class T>
  T* take(Index count) {
    const std::size_t bytes = (std::size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (chunks_.empty() || chunks_.back().size < used_ + bytes) {
      used_ = 0;
      const std::size_t size = std::max<std::size_t>(bytes, total_ + (std::size_t(1) << 20));
      grow(size);
    }
    const auto start = reinterpret_cast<std::uintptr_t>(chunks_.back().data.get());
    T* const found = reinterpret_cast<T*>((start + 63) / 64 * 64 + used_);
    used_ += bytes;
    return found;
  }
  // All that was taken is free again; what came in several chunks will be one, and much is given back.
  void reset() {
    constexpr std::size_t kKept = std::size_t(96) << 20;
    used_ = 0;
    if (chunks_.size() < 2 && total_ <= kKept) return;
    const std::size_t size = total_;
    chunks_.clear();
    total_ = 0;
    if (size > kKept) return;
    grow(size);
  }

 private:
  struct Chunk {
    std::unique_ptr<char[]> data;
    std::size_t size;
  };
  std::vector<Chunk> chunks_;
  std::size_t used_ = 0, total_ = 0;

  void grow(std::size_t size) {
    chunks_.push_back({std::make_unique_for_overwrite<char[]>(size + 64), size});
    ask_for_huge_pages(chunks_.back().data.get(), size);
    total_ += size;
  }
};

enum class Kind : std::uint8_t { none, inner, other };

struct Run {
  int from, to;  // blocks
  Kind kind;
};

// Bytes 0 or 1 for the points of a level, with zeros around.
struct Map {
  std::uint8_t* origin;
  Index pitch;
  FN_BODY std::uint8_t* row(int i) const { return origin + i * pitch; }
};

template <class T>
struct Level {
  static constexpr int kGuard = 2;  // rows of zeros above and below

  int ny, nx, blocks;
  Index half, pitch;
  T *centre, *inverse, *east, *south, *south_east, *south_west;  // at point (0, 0)
  Stencil<T> inner;
  T inner_inverse;
  Map active, innermost;         // points in use; those with the inner stencil
  std::uint8_t *kinds, *needed;  // [ny, blocks] kinds; whether stencils are stored
  Run* runs;
  int* first_run;  // [ny + 1]

  static bool near_page(Index distance) {
    constexpr Index kPage = 4096, kApart = 768;
    const Index bytes = distance * Index(sizeof(T)), over = bytes % kPage;
    return bytes > kPage / 2 && (over < kApart || over > kPage - kApart);
  }
  void shape(int rows, int columns) {
    ny = rows;
    nx = columns;
    blocks = (nx + kColumns - 1) / kColumns;
    half = Index(blocks + 3) * kLanes;  // a block of zeros before and two after: what transfers reach
    // A store must not look like one to the neighbour of a later load, of which the last 12 bits are compared.
    while (near_page(2 * half) || near_page(half)) half += kLanes;
    pitch = 2 * half;
  }
  // Numbers from one channel's field to the next one's. Not a multiple of a page, for the reason above.
  Index field_size() const {
    Index size = pitch * (ny + 2 * kGuard) + kLanes;
    while (size * Index(sizeof(T)) % 4096 != 1344) size += kLanes;
    return size;
  }
  // Fields of numbers, in which the rows of zeros above and below are set.
  T* field(Pool& pool, int channels = 1) const {
    T* const data = pool.take<T>(channels * field_size());
    const std::size_t guard = std::size_t(kGuard * pitch + kLanes) * sizeof(T);
    for (int c = 0; c < channels; ++c) {
      std::memset(data + c * field_size(), 0, guard);
      std::memset(data + c * field_size() + (ny + kGuard) * pitch, 0, guard);
    }
    return data + kGuard * pitch + kLanes;
  }
  // Sets to 0 what no run writes and one reads: beside it, and in the rows above and below.
  void clear_around_runs(T* data) const {
    for (int i = 0; i < ny; ++i) {
      int low = blocks, high = -1;
      for (int k = std::max(i - 1, 0); k <= std::min(i + 1, ny - 1); ++k) {
        if (first_run[k] == first_run[k + 1]) continue;
        low = std::min(low, runs[first_run[k]].from);
        high = std::max(high, runs[first_run[k + 1] - 1].to);
      }
      if (high < 0) continue;
      for (int h = 0; h < 2; ++h) {
        T* const row = data + i * pitch + h * half;
        int from = low - 1;
        each_run(i, [&](Run run) FN_INLINE {
          std::fill(row + from * kLanes, row + run.from * kLanes, T(0));
          from = run.to;
        });
        std::fill(row + from * kLanes, row + (high + 1) * kLanes, T(0));
      }
    }
  }
  // The same of all rows, to their ends.
  void clear_outside_runs(T* data) const {
    for (int i = 0; i < ny; ++i)
      for (int h = 0; h < 2; ++h) {
        T* const row = data + i * pitch + h * half;
        int from = -1;
        each_run(i, [&](Run run) FN_INLINE {
          std::fill(row + from * kLanes, row + run.from * kLanes, T(0));
          from = run.to;
        });
        std::fill(row + from * kLanes, row + (blocks + 2) * kLanes, T(0));
      }
  }
  // A row and the zeros beside it.
  FN_BODY void clear_row(T* row) const { std::memset(row - kLanes, 0, std::size_t(pitch) * sizeof(T)); }
  FN_BODY Index at(int i, int j) const { return i * pitch + (j & 1) * half + (j >> 1); }

  // f(block, kind) for the blocks of row i that are not empty.
  template <class F>
  FN_BODY void each_run(int i, F f) const {
    for (int r = first_run[i]; r < first_run[i + 1]; ++r) f(runs[r]);
  }
};

template <class T>
struct Grid {
  int levels;
  Level<T> level[kMaxLevels];
};

// ---- which points there are

inline Map new_map(Pool& pool, int ny, Index pitch) {
  constexpr int kGuard = 2;
  std::uint8_t* const data = pool.take<std::uint8_t>((ny + 2 * kGuard) * pitch);
  std::memset(data, 0, std::size_t(kGuard * pitch));
  std::memset(data + (ny + kGuard) * pitch, 0, std::size_t(kGuard * pitch));
  return {data + kGuard * pitch + kColumns, pitch};
}
template <class T>
void new_maps(Level<T>& l, Pool& pool) {
  const Index pitch = Index(l.blocks + 3) * kColumns;
  l.active = new_map(pool, l.ny, pitch);
  l.innermost = new_map(pool, l.ny, pitch);
}
template <class T>
void clear_sides(const Level<T>& l, std::uint8_t* row) {
  std::memset(row - kColumns, 0, kColumns);
  std::memset(row + l.nx, 0, std::size_t((l.blocks + 2) * kColumns - l.nx));
}

// Inner points of level 0 have four neighbours in the domain.
template <class T>
void find_inner(Level<T>& l) {
  for (int i = 0; i < l.ny; ++i) {
    const std::uint8_t *const m = l.active.row(i), *const north = l.active.row(i - 1),
                              *const south = l.active.row(i + 1);
    std::uint8_t* const to = l.innermost.row(i);
    clear_sides(l, to);
#pragma omp simd
    for (int j = 0; j < l.nx; ++j) to[j] = std::uint8_t(m[j] & m[j - 1] & m[j + 1] & north[j] & south[j]);
  }
}

template <bool kAny, class T>
void coarsen_map(const Map& from, const Level<T>& coarse, const Map& to, Pool& pool) {
  std::uint8_t* const columns = pool.take<std::uint8_t>(2 * coarse.nx + 2 + kColumns) + kColumns;
  for (int i = 0; i < coarse.ny; ++i) {
    const std::uint8_t *const a = from.row(2 * i - 1), *const b = from.row(2 * i), *const c = from.row(2 * i + 1);
    std::uint8_t* const out = to.row(i);
    clear_sides(coarse, out);
    const int n = 2 * coarse.nx;
#pragma omp simd
    for (int j = -1; j < n; ++j) columns[j] = kAny ? a[j] | b[j] | c[j] : a[j] & b[j] & c[j];
#pragma omp simd
    for (int j = 0; j < coarse.nx; ++j)
      out[j] = kAny ? columns[2 * j - 1] | columns[2 * j] | columns[2 * j + 1]
                    : columns[2 * j - 1] & columns[2 * j] & columns[2 * j + 1];
  }
}

// ---- runs

inline Kind kind_of(const std::uint8_t* active, const std::uint8_t* inner) {
  std::uint64_t a[2], b[2];
  std::memcpy(a, active, sizeof a);
  std::memcpy(b, inner, sizeof b);
  constexpr std::uint64_t kAll = 0x0101010101010101u;
  if ((a[0] | a[1]) == 0) return Kind::none;
  return (b[0] & b[1]) == kAll ? Kind::inner : Kind::other;
}

// A short run costs more than it saves: it becomes of the kind `other`, which is right for all.
inline void join_short_runs(std::uint8_t* kinds, int blocks, int least_inner, int least_none) {
  for (int from = 0; from < blocks;) {
    int to = from + 1;
    while (to < blocks && kinds[to] == kinds[from]) ++to;
    const bool side = from == 0 || to == blocks;
    if ((Kind(kinds[from]) == Kind::inner && to - from < least_inner) ||
        (Kind(kinds[from]) == Kind::none && !side && to - from < least_none))
      std::memset(kinds + from, int(Kind::other), std::size_t(to - from));
    from = to;
  }
}

template <class T>
void find_runs(Level<T>& l, int number, Pool& pool) {
  const int least_inner = number == 0 ? 12 : 8;
  constexpr int kLeastNone = 3;
  l.kinds = pool.take<std::uint8_t>(Index(l.ny) * l.blocks);
  l.needed = pool.take<std::uint8_t>(Index(l.ny) * l.blocks);
  l.runs = pool.take<Run>(Index(l.ny) * l.blocks);
  l.first_run = pool.take<int>(l.ny + 1);
  std::memset(l.needed, 0, std::size_t(Index(l.ny) * l.blocks));
  int count = 0;
  for (int i = 0; i < l.ny; ++i) {
    std::uint8_t* const kinds = l.kinds + Index(i) * l.blocks;
    for (int b = 0; b < l.blocks; ++b)
      kinds[b] = std::uint8_t(kind_of(l.active.row(i) + b * kColumns, l.innermost.row(i) + b * kColumns));
    join_short_runs(kinds, l.blocks, least_inner, kLeastNone);
    l.first_run[i] = count;
    for (int from = 0; from < l.blocks;) {
      int to = from + 1;
      while (to < l.blocks && kinds[to] == kinds[from]) ++to;
      if (Kind(kinds[from]) != Kind::none) l.runs[count++] = {from, to, Kind(kinds[from])};
      from = to;
    }
  }
  l.first_run[l.ny] = count;
}

// Marks the blocks of this level whose stencils are read: by runs of the kind `other`, and by the next level's.
template <class T>
void mark(Level<T>& l, int top, int bottom, int left, int right) {
  top = std::max(top, 0);
  bottom = std::min(bottom, l.ny - 1);
  left = std::max(left, 0);
  right = std::min(right, l.blocks - 1);
  if (left > right) return;
  for (int i = top; i <= bottom; ++i)
    std::memset(l.needed + Index(i) * l.blocks + left, 1, std::size_t(right - left + 1));
}
template <class T>
void mark_needed(Level<T>& l, const Level<T>* coarse) {
  for (int i = 0; i < l.ny; ++i)
    l.each_run(i, [&](Run run) FN_INLINE {
      if (run.kind == Kind::other) mark(l, i - 1, i, run.from - 1, run.to);
    });
  if (coarse == nullptr) return;
  // What is stored there for its own sake only, inner or empty, is not worked out of this level.
  for (int i = 0; i < coarse->ny; ++i)
    coarse->each_run(i, [&](Run run) FN_INLINE {
      if (run.kind == Kind::other) mark(l, 2 * i - 2, 2 * i + 2, 2 * run.from - 1, 2 * run.to);
    });
}

// ---- matrices

// The same stencil for blocks [from, to) of a row.
template <class T>
void fill_stencils(const Level<T>& l, int i, int from, int to, Stencil<T> s, T inverse, bool corners) {
  for (int h = 0; h < 2; ++h) {
    const Index at = i * l.pitch + h * l.half + from * kLanes, n = (to - from) * kLanes;
    std::fill_n(l.centre + at, n, s.centre);
    std::fill_n(l.inverse + at, n, inverse);
    std::fill_n(l.east + at, n, s.east);
    std::fill_n(l.south + at, n, s.south);
    if (corners) std::fill_n(l.south_east + at, n, s.south_east);
    if (corners) std::fill_n(l.south_west + at, n, s.south_west);
  }
}

// Which of an object's sides are the image's: there neighbours are missing.
struct Sides {
  bool north, south, west, east;
};

// Bytes of a block, of even columns and of odd ones.
template <class T>
struct Halves {
  Vector<T> half[2];
};
template <class T>
FN_BODY Halves<T> halves(const std::uint8_t* from) {
  typedef std::uint16_t Words __attribute__((vector_size(kColumns)));
  Words words;
  std::memcpy(&words, from, sizeof words);
  return {{__builtin_convertvector(words & 0xFF, Vector<T>), __builtin_convertvector(words >> 8, Vector<T>)}};
}

// Of blocks [from, to) of a row of level 0.
struct FinestStencils {
  template <class T>
  FN_BODY static void run(const Level<T>* level, int i, int from, int to, Sides sides) {
    const Level<T>& l = *level;
    const std::uint8_t *const m = l.active.row(i), *const below = l.active.row(i + 1);
    const T neighbours = T(4 - (sides.north && i == 0) - (sides.south && i == l.ny - 1));
    for (int b = from; b < to; ++b) {
      const Halves<T> here = halves<T>(m + b * kColumns), next = halves<T>(m + b * kColumns + 1);
      const Halves<T> under = halves<T>(below + b * kColumns);
      for (int h = 0; h < 2; ++h) {
        const Index at = i * l.pitch + h * l.half + b * kLanes;
        const Vector<T> c = here.half[h] * neighbours;
        store<T>(l.centre + at, c);
        store<T>(l.inverse + at, c > T(0) ? T(1) / c : Vector<T>{});
        store<T>(l.east + at, -(here.half[h] * next.half[h]));
        store<T>(l.south + at, -(here.half[h] * under.half[h]));
      }
    }
    const int ends[2] = {0, l.nx - 1};
    for (int e = 0; e < 2; ++e) {
      const int j = ends[e];
      if (!(e == 0 ? sides.west : sides.east) || j / kColumns < from || j / kColumns >= to) continue;
      T& c = l.centre[l.at(i, j)];
      c -= T(m[j]);
      l.inverse[l.at(i, j)] = c > T(0) ? T(1) / c : T(0);
    }
  }
};

// A number of a field, read when it is used.
template <class T>
struct Read {
  const T* at;
  FN_BODY explicit operator Vector<T>() const { return at == nullptr ? Vector<T>{} : load(at); }
};

// Of blocks [from, to) of a row of another level: each vector is of points (2I, 2J) of the level below in consecutive
// J. Level 0 has no corners.
template <bool kCorners>
struct CoarseStencils {
  template <class T>
  FN_BODY static void run(const Level<T>* below, const Level<T>* level, int i, int from, int to) {
    for (int b = from; b < to; ++b) of_block(*below, *level, i, b);
  }
  template <class T>
  FN_BODY static void of_block(const Level<T>& fine, const Level<T>& l, int i, int block) {
    alignas(64) T found[5][kColumns];
    for (int part = 0; part < kColumns; part += kLanes) {
      const Index origin = 2 * i * fine.pitch + 2 * block * kLanes + part;
      const auto stencil = galerkin<Vector<T>>([&](int di, int dj) FN_INLINE {
        const Index p = origin + di * fine.pitch + (dj & 1) * fine.half + (dj >> 1);
        return Stencil<Read<T>>{{fine.centre + p},
                                {fine.east + p},
                                {fine.south + p},
                                {kCorners ? fine.south_east + p : nullptr},
                                {kCorners ? fine.south_west + p : nullptr}};
      });
      store<T>(found[0] + part, stencil.centre);
      store<T>(found[1] + part, stencil.east);
      store<T>(found[2] + part, stencil.south);
      store<T>(found[3] + part, stencil.south_east);
      store<T>(found[4] + part, stencil.south_west);
    }
    const Index to = i * l.pitch + block * kLanes;
    T* const fields[5] = {l.centre, l.east, l.south, l.south_east, l.south_west};
    for (int f = 0; f < 5; ++f)
      split<T>(load(found[f]), load(found[f] + kLanes), fields[f] + to, fields[f] + to + l.half);
    for (int h = 0; h < 2; ++h) {
      const Vector<T> c = load(l.centre + to + h * l.half);
      store<T>(l.inverse + to + h * l.half, c > T(0) ? T(1) / c : Vector<T>{});
    }
  }
};

// Zeros left and right of what is stored of a row, where blocks at its ends read.
template <class T>
void clear_beside(const Level<T>& l, T* field, int i, bool left, bool right) {
  for (int h = 0; h < 2; ++h) {
    T* const row = field + i * l.pitch + h * l.half;
    if (left) std::memset(row - kLanes, 0, kLanes * sizeof(T));
    if (right) std::memset(row + l.blocks * kLanes, 0, 2 * kLanes * sizeof(T));
  }
}

template <class T>
void store_stencils(Grid<T>& grid, int number, Sides sides, Pool& pool) {
  Level<T>& l = grid.level[number];
  const bool corners = number > 0;
  for (T** field : {&l.centre, &l.inverse, &l.east, &l.south}) *field = l.field(pool);
  l.south_east = corners ? l.field(pool) : nullptr;
  l.south_west = corners ? l.field(pool) : nullptr;
  const Level<T>*const fine = number > 0 ? &grid.level[number - 1] : nullptr, *const own = &l;
  for (int i = 0; i < l.ny; ++i) {
    const std::uint8_t* const needed = l.needed + Index(i) * l.blocks;
    const bool left = needed[0], right = needed[l.blocks - 1];
    if (left || right) {
      for (T* field : {l.centre, l.inverse, l.east, l.south}) clear_beside(l, field, i, left, right);
      if (corners) clear_beside(l, l.south_east, i, left, right);
      if (corners) clear_beside(l, l.south_west, i, left, right);
    }
    const auto kind = [&](int b) {
      return number == 0 ? Kind::other : kind_of(l.active.row(i) + b * kColumns, l.innermost.row(i) + b * kColumns);
    };
    for (int from = 0; from < l.blocks;) {
      if (!needed[from]) {
        ++from;
        continue;
      }
      const Kind first = kind(from);
      int to = from + 1;
      while (to < l.blocks && needed[to] && kind(to) == first) ++to;
      if (first != Kind::other)
        fill_stencils(l, i, from, to, first == Kind::inner ? l.inner : Stencil<T>{},
                      first == Kind::inner ? l.inner_inverse : T(0), corners);
      else if (number == 0)
        run<FinestStencils>(own, i, from, to, sides);
      else if (fine->south_east == nullptr)
        run<CoarseStencils<false>>(fine, own, i, from, to);
      else
        run<CoarseStencils<true>>(fine, own, i, from, to);
      from = to;
    }
  }
}

// Level 0's `active` is set.
template <class T>
void build(Grid<T>& grid, Sides sides, Pool& pool) {
  find_inner(grid.level[0]);
  grid.levels = count_levels(grid.level[0].ny, grid.level[0].nx);
  for (int n = 1; n < grid.levels; ++n) {
    Level<T>&fine = grid.level[n - 1], &l = grid.level[n];
    l.shape(coarse_size(fine.ny), coarse_size(fine.nx));
    new_maps(l, pool);
    coarsen_map<true>(fine.active, l, l.active, pool);
    coarsen_map<false>(fine.innermost, l, l.innermost, pool);
  }
  Stencil<T> s{T(4), T(-1), T(-1), T(0), T(0)};
  for (int n = 0; n < grid.levels; ++n) {
    Level<T>& l = grid.level[n];
    l.inner = s;
    l.inner_inverse = T(1) / s.centre;
    find_runs(l, n, pool);
    s = galerkin<T>([s](int, int) FN_INLINE { return s; });
  }
  for (int n = 0; n < grid.levels; ++n) mark_needed(grid.level[n], n + 1 < grid.levels ? &grid.level[n + 1] : nullptr);
  for (int n = 0; n < grid.levels; ++n) store_stencils(grid, n, sides, pool);
}

}  // namespace fastnuggets::poisson

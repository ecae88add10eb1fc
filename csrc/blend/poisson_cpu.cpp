// CPU kernels: objects are shared out among threads, or of few objects the rows and channels. A channel is worked out
// by one thread in a fixed order, so the bits do not depend on their number.
#include <ATen/Parallel.h>

#include <atomic>

#include "blend/poisson_cpu_solver.h"
#include "blend/poisson_op.h"

namespace fastnuggets::poisson {
namespace {

template <class S>
using Real = std::conditional_t<std::is_same_v<S, double>, double, float>;

// An object, its levels and the unknowns of every channel.
template <class T>
struct Work {
  Placed place;
  Sides sides;
  bool bare, closed;  // right side only at the border (poisson_math.h); the domain is the whole image
  int channels;
  Grid<T> grid;
  Unknowns<T> unknowns[kMaxLevels];  // of all channels
  T* scratch;                        // [channels, Solver<T, 1>::scratch]
  T* changes;                        // [channels, 2] corrections of the last two cycles

  T* solution(int c) const { return unknowns[0].u + c * unknowns[0].step; }
  T* right_side(int c) const { return unknowns[0].b + c * unknowns[0].step; }
};

// ---- the domain

template <class S, class T>
void find_domain(const Scene& s, Work<T>& work, Pool& pool) {
  const Placed& p = work.place;
  Level<T>& l = work.grid.level[0];
  l.shape(p.ny, p.nx);
  new_maps(l, pool);
  const S* const mask = static_cast<const S*>(s.mask) + p.first;
  bool all = p.ny == s.H && p.nx == s.W;
  for (int i = 0; i < p.ny; ++i) {
    const S* const from = mask + p.object_pixel(i, 0);
    std::uint8_t* const to = l.active.row(i);
    clear_sides(l, to);
    std::uint8_t every = 1;
    if (s.soft)
      for (int j = 0; j < p.nx; ++j) to[j] = in_domain(from[j], true);
    else
      for (int j = 0; j < p.nx; ++j) to[j] = in_domain(from[j], false);
    for (int j = 0; all && j < p.nx; ++j) every &= to[j];
    all = all && every;
  }
  work.closed = all;
}

template <class S, class T>
void prepare(const Scene& s, Work<T>& work, Pool& pool) {
  const Placed& p = work.place;
  work.sides = {p.y == 0, p.y + p.ny == s.H, p.x == 0, p.x + p.nx == s.W};
  find_domain<S>(s, work, pool);
  Grid<T>& grid = work.grid;
  build(grid, work.sides, pool);
  for (int n = 0; n < grid.levels; ++n) {
    const Level<T>& l = grid.level[n];
    Unknowns<T>& x = work.unknowns[n];
    x = {l.field(pool, work.channels), l.field(pool, work.channels), l.field_size()};
    for (int c = 0; c < work.channels; ++c) {
      l.clear_around_runs(x.u + c * x.step);
      if (n > 0) l.clear_outside_runs(x.b + c * x.step);  // that of level 0 is written whole
    }
  }
  work.scratch = pool.take<T>(work.channels * Solver<T, 1>::scratch(grid));
  work.changes = pool.take<T>(2 * work.channels);
}

// ---- rows of numbers, in columns' order, of all channels

// Numbers of a row buffer: with whole blocks and what lies beside them.
inline Index width_of(int nx) { return Index(nx + kColumns) / kColumns * kColumns + 2 * kColumns; }

// Row buffers of one kind: [channels, width] with one element before the first column.
template <class T>
struct Row {
  T* data;
  Index width;
  T* of(int c) const { return data + c * width + kLanes; }
};

// n pixels from `from` on, `column` apart; of three channels side by side all at once.
struct ReadRow {
  template <class S, class T>
  FN_BODY static void run(const S* from, Index column, int n, T* to) {
    if (column == 1)
      for (int j = 0; j < n; ++j) to[j] = T(from[j]);
    else
      for (int j = 0; j < n; ++j) to[j] = T(from[j * column]);
  }
};
struct ReadThree {
  template <class S, class T>
  FN_BODY static void run(const S* from, int n, T* a, T* b, T* c) {
    for (int j = 0; j < n; ++j) {
      a[j] = T(from[3 * j]);
      b[j] = T(from[3 * j + 1]);
      c[j] = T(from[3 * j + 2]);
    }
  }
};
template <class S, class T>
void read_row(const S* from, Index channel, Index column, int channels, int n, const Row<T>& to) {
  if (column == 3 && channels == 3) return run<ReadThree>(from, n, to.of(0), to.of(1), to.of(2));
  for (int c = 0; c < channels; ++c) run<ReadRow>(from + c * channel, column, n, to.of(c));
}

// Where the channels of the object's visible part begin.
template <class S>
struct Source {
  const S* start;
  Index channel, row, column;
};
template <class S>
Source<S> image_source(const Scene& s, const Placed& p, const void* image) {
  const Plane plane = image_plane(s, p, 0);
  const Index channel = s.channels_last ? 1 : s.H * s.W;
  return {static_cast<const S*>(image) + plane.start, channel, plane.row, plane.column};
}
template <class S>
Source<S> object_source(const Scene& s, const Placed& p) {
  const Plane plane = object_plane(s, p, 0);
  const Index channel = s.channels_last ? 1 : p.h * p.w;
  return {static_cast<const S*>(s.pixels) + plane.start, channel, plane.row, plane.column};
}

// Row i, one of -1 to ny, of the background with the pixels left and right of it. What lies outside the image is as
// the pixel beside it.
template <class S, class T>
void read_image_row(const Source<S>& from, const Work<T>& work, int i, const Row<T>& to) {
  const int ny = work.place.ny, nx = work.place.nx;
  if (work.sides.north && i < 0) i = 0;
  if (work.sides.south && i >= ny) i = ny - 1;
  const S* const start = from.start + i * from.row;
  read_row(start, from.channel, from.column, work.channels, nx, to);
  for (int c = 0; c < work.channels; ++c) {
    T* const row = to.of(c);
    const S* const first = start + c * from.channel;
    row[-1] = work.sides.west ? row[0] : T(first[-from.column]);
    row[nx] = work.sides.east ? row[nx - 1] : T(first[nx * from.column]);
  }
}
// The same of the object, which goes on as its nearest pixel.
template <class S, class T>
void read_object_row(const Source<S>& from, const Work<T>& work, int i, const Row<T>& to) {
  const int nx = work.place.nx;
  i = std::clamp(i, 0, work.place.ny - 1);
  read_row(from.start + i * from.row, from.channel, from.column, work.channels, nx, to);
  for (int c = 0; c < work.channels; ++c) {
    T* const row = to.of(c);
    row[-1] = row[0];
    row[nx] = row[nx - 1];
  }
}

// Where a neighbour's own value is no condition: in the domain, and outside the image.
template <class T>
void read_free_row(const Work<T>& work, int i, T* to) {
  const int ny = work.place.ny, nx = work.place.nx;
  const bool outside = (work.sides.north && i < 0) || (work.sides.south && i >= ny);
  const std::uint8_t* const m = work.grid.level[0].active.row(i);
  for (int j = -1; j <= nx; ++j) to[j] = T(outside ? 1 : m[j]);
  if (work.sides.west) to[-1] = T(1);
  if (work.sides.east) to[nx] = T(1);
}
// Weights of the object, 0 beside it; what lies outside the image is as the pixel beside it.
template <class S, class T>
void read_weight_row(const Scene& s, const Work<T>& work, int i, T* to) {
  const Placed& p = work.place;
  if (work.sides.north && i < 0) i = 0;
  if (work.sides.south && i >= p.ny) i = p.ny - 1;
  if (i < 0 || i >= p.ny) return void(std::fill(to - 1, to + p.nx + 1, T(0)));
  const S* const from = static_cast<const S*>(s.mask) + p.first + p.object_pixel(i, 0);
  for (int j = 0; j < p.nx; ++j) to[j] = T(unit_mask(from[j]));
  to[-1] = work.sides.west ? to[0] : T(0);
  to[p.nx] = work.sides.east ? to[p.nx - 1] : T(0);
}

// What there is at a row of pixels; free, weight: see `read_free_row`, `read_weight_row`.
template <class T>
struct Around {
  const T *fg, *bg, *free, *weight;
};

// Three rows of everything around row i, each read once.
template <class S, class T>
class Window {
 public:
  static Index room(int channels, int nx) { return 3 * (2 * channels + 3) * width_of(nx); }

  Window(const Scene& s, const Work<T>& work, T* rows)
      : s_(s),
        work_(work),
        width_(width_of(work.place.nx)),
        rows_(rows),
        background_(image_source<S>(s, work.place, s.background)),
        object_(object_source<S>(s, work.place)) {}

  Row<T> background(int i) const { return {slot(i), width_}; }
  Row<T> object(int i) const { return {slot(i) + work_.channels * width_, width_}; }
  T* free(int i) const { return slot(i) + 2 * work_.channels * width_ + kLanes; }
  T* weight(int i) const { return free(i) + width_; }

  Around<T> around(int i, int c) const { return {object(i).of(c), background(i).of(c), free(i), weight(i)}; }

  void read(int i) {
    read_image_row(background_, work_, i, background(i));
    read_object_row(object_, work_, i, object(i));
    read_free_row(work_, i, free(i));
    if (s_.soft) read_weight_row<S>(s_, work_, i, weight(i));
  }

 private:
  const Scene& s_;
  const Work<T>& work_;
  Index width_;
  T* rows_;
  Source<S> background_, object_;

  T* slot(int i) const { return rows_ + Index((i + 3) % 3) * (2 * work_.channels + 3) * width_; }
};

// ---- the right side

// Of import it is not 0 only where a neighbour is outside the domain.
template <class S, class T>
void border_right_side(const Scene& s, const Work<T>& work, int first, int last) {
  const Placed& p = work.place;
  const Level<T>& l = work.grid.level[0];
  const Source<S> background = image_source<S>(s, p, s.background), object = object_source<S>(s, p);
  for (int c = 0; c < work.channels; ++c) {
    T* const b = work.right_side(c);
    std::memset(b + first * l.pitch - kLanes, 0, std::size_t((last - first) * l.pitch) * sizeof(T));
  }
  for (int i = first; i < last; ++i) {
    const std::uint8_t *const active = l.active.row(i), *const inner = l.innermost.row(i);
    for (int start = 0; start < p.nx; start += 8) {
      std::uint64_t a, n;
      std::memcpy(&a, active + start, sizeof a);
      std::memcpy(&n, inner + start, sizeof n);
      for (std::uint64_t left = a & ~n; left != 0; left &= left - 1) {
        const int j = start + __builtin_ctzll(left) / 8;
        const int to[4][2] = {{i - 1, j}, {i + 1, j}, {i, j - 1}, {i, j + 1}};
        const bool image[4] = {i > 0 || !work.sides.north, i < p.ny - 1 || !work.sides.south, j > 0 || !work.sides.west,
                               j < p.nx - 1 || !work.sides.east};
        for (int d = 0; d < 4; ++d) {
          if (!image[d] || l.active.row(to[d][0])[to[d][1]]) continue;
          const Index row = std::clamp(to[d][0], 0, p.ny - 1), column = std::clamp(to[d][1], 0, p.nx - 1);
          const S* const bg = background.start + to[d][0] * background.row + to[d][1] * background.column;
          const S* const fg = object.start + row * object.row + column * object.column;
          for (int c = 0; c < work.channels; ++c)
            work.right_side(c)[l.at(i, j)] += T(bg[c * background.channel]) - T(fg[c * object.channel]);
        }
      }
    }
  }
}

// Values in columns' order into row i of a field, 0 outside the domain.
struct PutRow {
  template <class T>
  FN_BODY static void run(const Level<T>* l, int i, const T* from, T* field) {
    const std::uint8_t* const m = l->active.row(i);
    T* const to = field + i * l->pitch;
    for (int h = 0; h < 2; ++h) {
      std::fill_n(to + h * l->half - kLanes, kLanes, T(0));
      std::fill_n(to + h * l->half + l->blocks * kLanes, 2 * kLanes, T(0));
    }
    for (int k = 0; k < l->blocks * kLanes; k += kLanes) {
      const Halves<T> inside = halves<T>(m + 2 * k);
      alignas(64) T half[2][kLanes];
      split<T>(load(from + 2 * k), load(from + 2 * k + kLanes), half[0], half[1]);
      for (int h = 0; h < 2; ++h) store<T>(to + h * l->half + k, inside.half[h] > T(0) ? load(half[h]) : Vector<T>{});
    }
  }
};

template <Guidance guidance, bool kSoft>
struct EdgesRightSide {
  template <class T>
  FN_BODY static void run(Around<T> above, Around<T> here, Around<T> below, int n, T* sum) {
    const auto edge = [&](int j, const Around<T>& other, int q) FN_INLINE {
      const T share = kSoft ? T(0.5) * (here.weight[j] + other.weight[q]) : T(1);
      const T border = (T(1) - other.free[q]) * (other.bg[q] - other.fg[q]);
      return border + edge_right_side(guidance, false, here.fg[j], other.fg[q], here.bg[j], other.bg[q], share, true);
    };
#pragma omp simd
    for (int j = 0; j < n; ++j)
      sum[j] = (edge(j, here, j - 1) + edge(j, here, j + 1)) + (edge(j, above, j) + edge(j, below, j));
  }
};

// f.template operator()<guidance>()
template <class F>
void by_guidance(Guidance guidance, F f) {
  switch (guidance) {
    case Guidance::import:
      return f.template operator()<Guidance::import>();
    case Guidance::mixed:
      return f.template operator()<Guidance::mixed>();
    case Guidance::average:
      return f.template operator()<Guidance::average>();
  }
}

template <class S, class T>
void right_side(const Scene& s, const Work<T>& work, int first, int last, T* rows) {
  if (work.bare) return border_right_side<S>(s, work, first, last);
  const int nx = work.place.nx;
  Window<S, T> window(s, work, rows);
  T* const sum = rows + Window<S, T>::room(work.channels, nx);
  window.read(first - 1);
  window.read(first);
  for (int i = first; i < last; ++i) {
    window.read(i + 1);
    for (int c = 0; c < work.channels; ++c) {
      by_guidance(s.guidance, [&]<Guidance guidance>() {
        const Around<T> above = window.around(i - 1, c), here = window.around(i, c), below = window.around(i + 1, c);
        if (s.soft)
          run<EdgesRightSide<guidance, true>>(above, here, below, nx, sum);
        else
          run<EdgesRightSide<guidance, false>>(above, here, below, nx, sum);
      });
      run<PutRow>(&work.grid.level[0], i, std::as_const(sum), work.right_side(c));
    }
  }
}

// ---- the solution of a channel

// Mean over all points, of a domain that is the whole image.
template <class T>
void subtract_mean(const Level<T>& l, T* field) {
  double sum = 0;
  for (int i = 0; i < l.ny; ++i)
    for (int j = 0; j < l.nx; ++j) sum += double(field[l.at(i, j)]);
  const T mean = T(sum / (double(l.ny) * l.nx));
  for (int i = 0; i < l.ny; ++i)
    for (int j = 0; j < l.nx; ++j) field[l.at(i, j)] -= mean;
}

// kC channels from c: the first cycles, or one more.
template <int kC, class T>
void solve_group(const Work<T>& work, int c, bool first) {
  const Level<T>& l = work.grid.level[0];
  Unknowns<T> x[kMaxLevels];
  for (int n = 0; n < work.grid.levels; ++n) {
    const Unknowns<T>& all = work.unknowns[n];
    x[n] = {all.u + c * all.step, all.b + c * all.step, all.step};
  }
  for (int k = 0; first && work.closed && k < kC; ++k) subtract_mean(l, work.right_side(c + k));
  Solver<T, kC> solver(work.grid, work.bare, x, work.scratch + c * Solver<T, 1>::scratch(work.grid));
  T changes[2 * kC];
  if (first)
    solver.start(changes);
  else
    solver.cycle(changes + kC);
  for (int k = 0; k < kC; ++k) {
    T* const to = work.changes + 2 * (c + k);
    to[0] = first ? changes[k] : to[1];
    to[1] = changes[kC + k];
  }
}
// float64 is for tests of gradients: there channels go one by one.
template <class T>
constexpr int kTogether = std::is_same_v<T, double> ? 1 : 3;
template <class T>
void solve_channels(const Work<T>& work, int from, int to, bool first) {
  while (from < to) {
    const int count = std::min(to - from, kTogether<T>);
    if constexpr (kTogether<T> == 3) {
      if (count == 3) solve_group<3>(work, from, first);
      if (count == 2) solve_group<2>(work, from, first);
    }
    if (count == 1) solve_group<1>(work, from, first);
    from += count;
  }
}

// Row i of the solution in columns' order.
template <class T>
void take_solution(const Work<T>& work, int c, int i, T* to) {
  const Unknowns<T> x{work.solution(c), nullptr, 0};
  run<Spread<1>>(&work.grid.level[0], &x, i, to, Index(0));
}

template <class S, class T>
FN_BODY S stored(T x) {
  if constexpr (std::is_same_v<S, std::uint8_t>) {
    const T low = x > T(0) ? x : T(0), in = low < T(255) ? low : T(255);
    return S(int(in + T(0.5)));
  } else {
    return x;
  }
}

template <class S>
struct Results {
  template <class T>
  FN_BODY static void run(const T* object, const T* solution, int n, S* to) {
#pragma omp simd
    for (int j = 0; j < n; ++j) to[j] = stored<S>(object[j] + solution[j]);
  }
};
struct WriteRow {
  template <class S>
  FN_BODY static void run(const S* from, const std::uint8_t* inside, Index column, int n, S* to) {
    if (column == 1)
      for (int j = 0; j < n; ++j) to[j] = inside[j] ? from[j] : to[j];
    else
      for (int j = 0; j < n; ++j) to[j * column] = inside[j] ? from[j] : to[j * column];
  }
};
struct WriteThree {
  template <class S>
  FN_BODY static void run(const S* a, const S* b, const S* c, const std::uint8_t* inside, int n, S* to) {
    const auto put = [&](int j) FN_INLINE {
      to[3 * j] = a[j];
      to[3 * j + 1] = b[j];
      to[3 * j + 2] = c[j];
    };
    int j = 0;
    for (; j + 8 <= n; j += 8) {  // mostly all of them or none
      std::uint64_t some;
      std::memcpy(&some, inside + j, sizeof some);
      if (some == 0x0101010101010101u)
        for (int k = 0; k < 8; ++k) put(j + k);
      else if (some != 0)
        for (int k = 0; k < 8; ++k)
          if (inside[j + k]) put(j + k);
    }
    for (; j < n; ++j)
      if (inside[j]) put(j);
  }
};

// Whether all that goes into the image is finite.
template <class S>
bool finite(const S* from, const std::uint8_t* inside, int n) {
  bool all = true;
  if constexpr (std::is_floating_point_v<S>)
    for (int j = 0; j < n; ++j) all &= !inside[j] || from[j] - from[j] == S(0);
  return all;
}

// image = object + solution in the domain. Returns whether it is finite.
template <class S, class T>
bool write_rows(const Scene& s, const Work<T>& work, void* image, int first, int last, T* rows) {
  const Level<T>& l = work.grid.level[0];
  const int nx = work.place.nx;
  const Index width = width_of(nx);
  const Source<S> object = object_source<S>(s, work.place), to = image_source<S>(s, work.place, image);
  const Row<T> fg{rows, width};
  T* const h = rows + (work.channels + 1) * width;
  S* const out = reinterpret_cast<S*>(h + width);
  bool all = true;
  for (int i = first; i < last; ++i) {
    if (l.first_run[i] == l.first_run[i + 1]) continue;
    const int left = l.runs[l.first_run[i]].from * kColumns;  // of the columns that there are runs of
    const int n = std::min(nx, l.runs[l.first_run[i + 1] - 1].to * kColumns) - left;
    const std::uint8_t* const inside = l.active.row(i) + left;
    const S* const pixels = object.start + i * object.row + left * object.column;
    read_row(pixels, object.channel, object.column, work.channels, n, fg);
    for (int c = 0; c < work.channels; ++c) {
      take_solution(work, c, i, h);
      run<Results<S>>(static_cast<const T*>(fg.of(c)), static_cast<const T*>(h + left), n, out + c * width);
      all = finite(out + c * width, inside, n) && all;
    }
    S* const start = const_cast<S*>(to.start) + i * to.row + left * to.column;
    if (to.column == 3 && work.channels == 3) {
      const S* const a = out;
      run<WriteThree>(a, a + width, a + 2 * width, inside, n, start);
      continue;
    }
    for (int c = 0; c < work.channels; ++c)
      run<WriteRow>(static_cast<const S*>(out + c * width), inside, to.column, n, start + c * to.channel);
  }
  return all;
}

// ---- backward

template <class S, class T>
void gradient_right_side(const BlendBackward& how, const Work<T>& work, int first, int last, T* rows) {
  const Row<T> row{rows, width_of(work.place.nx)};
  const Source<S> grad = image_source<S>(how.scene, work.place, how.grad);
  for (int i = first; i < last; ++i) {
    read_row(grad.start + i * grad.row, grad.channel, grad.column, work.channels, work.place.nx, row);
    for (int c = 0; c < work.channels; ++c)
      run<PutRow>(&work.grid.level[0], i, static_cast<const T*>(row.of(c)), work.right_side(c));
  }
}

// The solution around row i; what lies outside the image is as the pixel beside it, so that edges to it count nothing.
template <class T>
void read_solution_row(const Work<T>& work, int c, int i, T* to) {
  const int ny = work.place.ny, nx = work.place.nx;
  if (work.sides.north && i < 0) i = 0;
  if (work.sides.south && i >= ny) i = ny - 1;
  if (i < 0 || i >= ny) return void(std::fill(to - 1, to + nx + 1, T(0)));
  take_solution(work, c, i, to);
  const std::uint8_t* const inside = work.grid.level[0].active.row(i);
  for (int j = 0; j < nx; ++j) to[j] = inside[j] ? to[j] : T(0);
  to[-1] = work.sides.west ? to[0] : T(0);
  to[nx] = work.sides.east ? to[nx - 1] : T(0);
}

// Sums over the edges in one direction of pixels [from, to): `here` and `x`, the solution, at the pixels, `there` and
// `y` at the other ends. `same`: these are pixels of the object as well.
template <class T>
struct Sums {
  T *background, *object, *mask;
};
template <Guidance guidance, bool kSoft>
struct EdgeGradients {
  template <class T>
  FN_BODY static void run(Around<T> here, Around<T> there, const T* x, const T* y, int dj, int from, int to, bool same,
                          Sums<T> sums) {
    const T keep = T(same);
#pragma omp simd
    for (int j = from; j < to; ++j) {
      const int q = j + dj;
      const T cotangent = x[j] - y[q], share = kSoft ? T(0.5) * (here.weight[j] + there.weight[q]) : T(1);
      const EdgeSlopes<T> slopes = edge_slopes(guidance, here.fg[j] - there.fg[q], here.bg[j] - there.bg[q], share);
      sums.background[j] += cotangent * slopes.by_bg;
      sums.object[j] += keep * cotangent * slopes.by_fg;
      if (kSoft) sums.mask[j] += T(0.5) * cotangent * slopes.by_weight;
    }
  }
};

// Gradients of the pixels of rows [first, last); those of the pixels beside the object are `gradients_beside`.
template <class T>
void gradients(const BlendBackward& how, const Work<T>& work, int first, int last, T* rows) {
  const Scene& s = how.scene;
  const Placed& p = work.place;
  const int nx = p.nx, ny = p.ny;
  const Index width = width_of(nx);
  Window<T, T> window(s, work, rows);
  T* const solutions = rows + Window<T, T>::room(work.channels, nx);  // [3, channels, width]
  const auto solution = [&](int i, int c) {
    return solutions + (Index((i + 3) % 3) * work.channels + c) * width + kLanes;
  };
  T* const sums = solutions + 3 * work.channels * width;
  const Sums<T> sum{sums, sums + width, sums + 2 * width};
  const bool constant = !s.soft && s.guidance != Guidance::mixed;  // the slopes do not depend on the values
  const auto read = [&](int i) {
    if (!constant) window.read(i);
    for (int c = 0; c < work.channels; ++c) read_solution_row(work, c, i, solution(i, c));
  };
  read(first - 1);
  read(first);
  for (int i = first; i < last; ++i) {
    read(i + 1);
    const std::uint8_t* const inside = work.grid.level[0].active.row(i);
    std::fill(sum.mask, sum.mask + nx, T(0));
    for (int c = 0; c < work.channels; ++c) {
      std::fill(sum.background, sum.background + nx, T(0));
      std::fill(sum.object, sum.object + nx, T(0));
      const Around<T> here = window.around(i, c);
      const T* const x = solution(i, c);
      const auto edges = [&](int di, int dj, int from, int to, bool same) {
        const Around<T> there = window.around(i + di, c);
        const T* const y = solution(i + di, c);
        by_guidance(s.guidance, [&]<Guidance guidance>() {
          if (s.soft)
            run<EdgeGradients<guidance, true>>(here, there, x, y, dj, from, to, same, sum);
          else
            run<EdgeGradients<guidance, false>>(here, there, x, y, dj, from, to, same, sum);
        });
      };
      edges(-1, 0, 0, nx, i > 0);
      edges(1, 0, 0, nx, i < ny - 1);
      edges(0, -1, 0, 1, false);
      edges(0, -1, 1, nx, true);
      edges(0, 1, 0, nx - 1, true);
      edges(0, 1, nx - 1, nx, false);
      if (how.grad_background != nullptr) {
        const T *const north = solution(i - 1, c), *const south = solution(i + 1, c);
        const Source<T> to = image_source<T>(s, p, how.grad_background);
        T* const row = const_cast<T*>(to.start) + c * to.channel + i * to.row;
        for (int j = 0; j < nx; ++j) {  // outside the domain a pixel is the condition of its neighbours inside
          const T outside = row[j * to.column] + (north[j] + south[j]) + (x[j - 1] + x[j + 1]);
          row[j * to.column] = (inside[j] ? T(0) : outside) + sum.background[j];
        }
      }
      if (how.grad_pixels != nullptr) {
        const Plane plane = object_plane(s, p, c);
        T* const row = static_cast<T*>(how.grad_pixels) + plane.start + i * plane.row;
        for (int j = 0; j < nx; ++j) row[j * plane.column] += sum.object[j];
      }
    }
    if (how.grad_mask != nullptr) {
      T* const row = static_cast<T*>(how.grad_mask) + p.first + p.object_pixel(i, 0);
      for (int j = 0; j < nx; ++j) row[j] += sum.mask[j];
    }
  }
}

// Pixels of the background beside the object's rectangle: each is a condition of one pixel at most.
template <class T>
void gradients_beside(const BlendBackward& how, const Work<T>& work) {
  const Scene& s = how.scene;
  const Placed& p = work.place;
  if (how.grad_background == nullptr) return;
  const Level<T>& l = work.grid.level[0];
  const Source<T> background = image_source<T>(s, p, s.background);
  const Source<T> to = image_source<T>(s, p, how.grad_background);
  const T* const mask = static_cast<const T*>(s.mask) + p.first;
  const auto beside = [&](int i, int j, int di, int dj) FN_INLINE {
    if (!l.active.row(i)[j]) return;
    const Index at = i * to.row + j * to.column, out = at + di * to.row + dj * to.column;
    const T weight = s.soft ? T(0.5) * mask[p.object_pixel(i, j)] : T(1);
    for (int c = 0; c < work.channels; ++c) {
      const Index channel = c * to.channel;
      const T x = work.solution(c)[l.at(i, j)];
      const T bg = background.start[channel + out] - background.start[channel + at];
      const_cast<T*>(to.start)[channel + out] += x - x * edge_slopes(s.guidance, T(0), bg, weight).by_bg;
    }
  };
  for (int j = 0; j < p.nx; ++j) {
    if (!work.sides.north) beside(0, j, -1, 0);
    if (!work.sides.south) beside(p.ny - 1, j, 1, 0);
  }
  for (int i = 0; i < p.ny; ++i) {
    if (!work.sides.west) beside(i, 0, 0, -1);
    if (!work.sides.east) beside(i, p.nx - 1, 0, 1);
  }
}

// Where the domain is the whole image the mean of the result is the object's.
template <class T>
void gradient_of_mean(const BlendBackward& how, const Work<T>& work) {
  const Placed& p = work.place;
  const Source<T> grad = image_source<T>(how.scene, p, how.grad);
  for (int c = 0; c < work.channels; ++c) {
    const Plane plane = object_plane(how.scene, p, c);
    double sum = 0;
    for (int i = 0; i < p.ny; ++i)
      for (int j = 0; j < p.nx; ++j) sum += double(grad.start[c * grad.channel + i * grad.row + j * grad.column]);
    const T mean = T(sum / (double(p.ny) * p.nx));
    T* const out = static_cast<T*>(how.grad_pixels) + plane.start;
    for (int i = 0; i < p.ny; ++i)
      for (int j = 0; j < p.nx; ++j) out[i * plane.row + j * plane.column] += mean;
  }
}

// ---- objects

// f(from, to) over parts of [0, n) of at least `grain`, on several threads if they are free.
template <class F>
void share_out(bool share, Index n, Index grain, F f) {
  if (share)
    at::parallel_for(0, n, grain, f);
  else
    f(Index(0), n);
}

// Rows that are worth a second thread, and the bands of rows, each with buffers of its own.
constexpr Index kPixels = 1 << 15;
template <class T>
Index band_of(const Work<T>& work) {
  return std::max<Index>(8, kPixels / std::max(1, work.place.nx));
}

template <class S>
class Object {
 public:
  using T = Real<S>;

  // Sets the object up; false if there is nothing to solve.
  Object(const Scene& s, Index n, bool share, Pool& pool) : s_(s), share_(share) {
    work_.place = place(s, n);
    if (!work_.place.legal || work_.place.ny == 0 || s.C == 0) return;
    work_.channels = int(s.C);
    work_.bare = s.guidance == Guidance::import && !s.soft;
    prepare<S>(s, work_, pool);
    ready_ = true;
  }
  bool legal() const { return work_.place.legal; }

  float blend(const Blend& how, Pool& pool) {
    if (!ready_) return legal() ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    const T level_size = std::is_same_v<S, std::uint8_t> ? T(1) : T(1) / T(255);
    for_rows(pool, [&](int from, int to, T* rows) { right_side<S>(s_, work_, from, to, rows); });
    const T error = solve(T(how.effort.tolerance) * level_size, how.effort.max_cycles, false);
    std::atomic<bool> finite = true;
    for_rows(pool, [&](int from, int to, T* rows) {
      if (!write_rows<S>(s_, work_, how.image, from, to, rows)) finite = false;
    });
    return finite ? float(error / level_size) : std::numeric_limits<float>::quiet_NaN();
  }

  float backward(const BlendBackward& how, Pool& pool) {
    if (!ready_) return legal() ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    work_.bare = false;
    T error = 0;
    if constexpr (std::is_floating_point_v<S>) {
      for_rows(pool, [&](int from, int to, T* rows) { gradient_right_side<S>(how, work_, from, to, rows); });
      error = solve(T(how.effort.tolerance) / T(255), how.effort.max_cycles, true);
      for_rows(pool, [&](int from, int to, T* rows) { gradients(how, work_, from, to, rows); });
      gradients_beside(how, work_);
      if (work_.closed && how.grad_pixels != nullptr) gradient_of_mean(how, work_);
    }
    return float(error * T(255));
  }

 private:
  Scene s_;
  Work<T> work_{};
  bool share_, ready_ = false;

  // f(from, to, buffers) over bands of rows.
  template <class F>
  void for_rows(Pool& pool, F f) {
    const Index room = 2 * Window<T, T>::room(work_.channels, work_.place.nx);
    const Index rows = work_.place.ny, band = share_ ? band_of(work_) : rows, bands = (rows + band - 1) / band;
    if (rows_ == nullptr || bands > bands_) rows_ = pool.take<T>(room * bands);
    bands_ = bands;
    share_out(share_, bands, 1, [&](Index from, Index to) {
      for (Index k = from; k < to; ++k) f(int(k * band), int(std::min(rows, (k + 1) * band)), rows_ + k * room);
    });
  }
  T* rows_ = nullptr;
  Index bands_ = 0;

  // Returns the estimate of the largest error; of the largest value, if `relative`. All channels have the same number
  // of cycles, so that it does not matter which are solved together.
  T solve(T tolerance, int max_cycles, bool relative) {
    const Index groups = share_ ? std::min<Index>(at::get_num_threads(), work_.channels) : 1;
    for (int cycle = 1;; ++cycle) {
      share_out(share_, groups, 1, [&](Index from, Index to) {
        for (Index g = from; g < to; ++g)
          solve_channels(work_, int(work_.channels * g / groups), int(work_.channels * (g + 1) / groups), cycle == 1);
      });
      const T error = worst(relative);
      if (!(error > tolerance) || cycle >= max_cycles) {
        for (int c = 0; work_.closed && c < work_.channels; ++c) subtract_mean(work_.grid.level[0], work_.solution(c));
        return error;
      }
    }
  }
  T worst(bool relative) const {
    T found = 0;
    for (int c = 0; c < work_.channels; ++c) {
      T error = T(error_left(float(work_.changes[2 * c + 1]), float(work_.changes[2 * c])));
      if (relative && error > T(0)) {
        T largest;
        run<Largest>(&work_.grid.level[0], static_cast<const T*>(work_.solution(c)), &largest);
        error /= largest;
      }
      if (!(error <= found)) found = error;
    }
    return found;
  }
};

template <class S, class How>
float run_object(const How& how, Index n, bool share) {
  static thread_local Pool pool;
  struct Reset {
    ~Reset() { pool.reset(); }
  } reset;
  Object<S> object(how.scene, n, share, pool);
  if constexpr (std::is_same_v<How, Blend>)
    return object.blend(how, pool);
  else
    return object.backward(how, pool);
}

// Whether rows of the table name the same pixels, whose gradients are then added up in the order of the rows.
bool overlap(const Scene& s) {
  std::vector<std::pair<Index, Index>> spans;
  for (Index n = 0; n < s.N; ++n) {
    const Placed p = place(s, n);
    if (p.legal) spans.emplace_back(p.first, p.first + p.h * p.w);
  }
  std::sort(spans.begin(), spans.end());
  for (std::size_t k = 1; k < spans.size(); ++k)
    if (spans[k].first < spans[k - 1].second) return true;
  return false;
}

template <class S, class How>
void run_as(const How& how) {
  bool together = how.scene.N >= at::get_num_threads();
  if constexpr (std::is_same_v<How, BlendBackward>)
    together = together && (at::get_num_threads() == 1 || !overlap(how.scene));
  share_out(together, how.scene.N, 1, [&](Index from, Index to) {
    for (Index n = from; n < to; ++n) how.info[n] = run_object<S>(how, n, !together);
  });
}

void run_blend(const Blend& how) {
  if (how.scene.dtype == Dtype::uint8) return run_as<std::uint8_t>(how);
  return how.scene.dtype == Dtype::float64 ? run_as<double>(how) : run_as<float>(how);
}
void run_backward(const BlendBackward& how) {
  return how.scene.dtype == Dtype::float64 ? run_as<double>(how) : run_as<float>(how);
}

const Kernels kCpu{&run_blend, &run_backward};
const Register kRegistered(at::kCPU, kCpu);

}  // namespace
}  // namespace fastnuggets::poisson

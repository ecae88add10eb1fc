// Multigrid on the levels of poisson_cpu_grid.h, up to three channels side by side. A pass goes over a level's rows
// once and does all that lies between two visits of the next level: interpolation, relaxations, residual, restriction,
// each some rows behind the other.
#pragma once

#include <cmath>
#include <limits>

#include "blend/poisson_cpu_grid.h"

namespace fastnuggets::poisson {

// Of kC channels that are solved together; those of channel c lie c * step further.
template <class T>
struct Unknowns {
  T *u, *b;  // at point (0, 0)
  Index step;
};

enum class From : int { nothing, values, corrections };  // what a pass takes from the next level at its start

// ---- rows of kC channels. `x` are the level's unknowns.

// The numbers beside those of group k of half h, in the other half, whose row begins at `row`: in half 0 the west ones
// are one place back, in half 1 the east ones one ahead. They are put together of whole groups, as a load that overlaps
// a store just made must wait.
template <int h, class T>
struct Beside {
  using V = Vector<T>;
  V west, east;

  FN_BODY Beside(const T* row, Index k) {
    if constexpr (h == 0) {
      east = load(row + k);
      west = __builtin_shuffle(load(row + k - kLanes), east, Places<T>{7, 8, 9, 10, 11, 12, 13, 14});
    } else {
      west = load(row + k);
      east = __builtin_shuffle(west, load(row + k + kLanes), Places<T>{1, 2, 3, 4, 5, 6, 7, 8});
    }
  }
};

// u in columns' order.
template <int kC>
struct Spread {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, T* to, Index step) {
    for (int c = 0; c < kC; ++c) {
      const T* const u = x->u + c * x->step + i * l->pitch;
      for (int k = 0; k < l->blocks * kLanes; k += kLanes)
        interleave<T>(load(u + k), load(u + l->half + k), to + c * step + 2 * k);
    }
  }
};

// Row i of b from the residuals (or right sides) of rows 2i - 1, 2i, 2i + 1 of the level below, even columns first, the
// odd ones at `half`. `kClears`: u = 0.
enum class Sparse : int { no, red, last };  // which are 0: none, those of black points, those in odd rows and columns
template <int kC, Sparse kSparse, bool kClears>
struct Restrict {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, const T* above, const T* here, const T* below,
                          Index half, Index step) {
    using V = Vector<T>;
    const auto sum = [&](Index k) FN_INLINE {  // kLanes points from k in columns' order
      const T *const a = above + half + k, *const b = below + half + k;
      V found = load(here + k);
      if constexpr (kSparse != Sparse::last) found += T(0.25) * ((load(a - 1) + load(a)) + (load(b - 1) + load(b)));
      if constexpr (kSparse != Sparse::red)
        found += T(0.5) * ((load(here + half + k - 1) + load(here + half + k)) + (load(above + k) + load(below + k)));
      return found;
    };
    T* const b = x->b + i * l->pitch;
    T* const u = x->u + i * l->pitch;
    l->each_run(i, [&](Run run) FN_INLINE {
      for (int k = run.from * kLanes; k < run.to * kLanes; k += kLanes)
        for (int c = 0; c < kC; ++c) {
          const Index at = c * x->step + k, from = c * step + 2 * k;
          split<T>(sum(from), sum(from + kLanes), b + at, b + at + l->half);
          if (kClears) store<T>(u + at, V{});
          if (kClears) store<T>(u + at + l->half, V{});
        }
    });
  }
};

// ---- level 0: five points, red and black

// Half h of a row. `bare`: b of inner runs is 0.
template <int kC, bool kOver>
struct RelaxFive {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, int h, bool bare) {
    h == 0 ? of_half<0>(*l, *x, i, bare) : of_half<1>(*l, *x, i, bare);
  }
  template <int h, class T>
  FN_BODY static void of_half(const Level<T>& l, const Unknowns<T>& x, int i, bool bare) {
    using V = Vector<T>;
    const Index row = i * l.pitch + h * l.half;
    T* const own = x.u + row;
    const T *const other = x.u + i * l.pitch + (1 - h) * l.half, *const b = x.b + row, *const inverse = l.inverse + row;
    l.each_run(i, [&](Run run) FN_INLINE {
      const int from = run.from * kLanes, to = run.to * kLanes;
      const auto each = [&](auto right_side, auto factor) FN_INLINE {
        for (int k = from; k < to; k += kLanes) {
          const V inverted = factor(k);
          for (int c = 0; c < kC; ++c) {
            const Index at = c * x.step + k;
            const Beside<h, T> beside(other, at);
            V found = relax5(right_side(at), load(own + at - l.pitch), load(own + at + l.pitch), beside.west,
                             beside.east, inverted);
            if constexpr (kOver) {
              const V old = load(own + at);
              found = old + T(kRedFactor) * (found - old);
            }
            store<T>(own + at, found);
          }
        }
      };
      const auto given = [&](Index at) FN_INLINE { return load(b + at); };
      const auto quarter = [](int) FN_INLINE { return V{} + T(0.25); };
      if (run.kind == Kind::other)
        each(given, [&](int k) FN_INLINE { return load(inverse + k); });
      else if (bare)
        each([](Index) FN_INLINE { return V{}; }, quarter);
      else
        each(given, quarter);
    });
  }
};

template <int kC>
struct RedResidual {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, bool bare, T* to, Index step) {
    for (int c = 0; c < kC; ++c) l->clear_row(to + c * step);
    (i & 1) == 0 ? of_half<0>(*l, *x, i, bare, to, step) : of_half<1>(*l, *x, i, bare, to + l->half, step);
  }
  template <int h, class T>
  FN_BODY static void of_half(const Level<T>& l, const Unknowns<T>& x, int i, bool bare, T* to, Index step) {
    using V = Vector<T>;
    const Index row = i * l.pitch + h * l.half;
    const T *const own = x.u + row, *const other = x.u + i * l.pitch + (1 - h) * l.half;
    const T *const b = x.b + row, *const centre = l.centre + row, *const inverse = l.inverse + row;
    l.each_run(i, [&](Run run) FN_INLINE {
      const int first = run.from * kLanes, last = run.to * kLanes;
      const auto each = [&](auto right_side, auto stencil) FN_INLINE {
        for (int k = first; k < last; k += kLanes) {
          const auto [middle, inverted] = stencil(k);
          for (int c = 0; c < kC; ++c) {
            const Index at = c * x.step + k;
            const Beside<h, T> beside(other, at);
            const V relaxed = relax5(right_side(at), load(own + at - l.pitch), load(own + at + l.pitch), beside.west,
                                     beside.east, inverted);
            store<T>(to + c * step + k, middle * (relaxed - load(own + at)));
          }
        }
      };
      const auto given = [&](Index at) FN_INLINE { return load(b + at); };
      const auto inner = [](int) FN_INLINE { return std::pair<V, V>(V{} + T(4), V{} + T(0.25)); };
      if (run.kind == Kind::other)
        each(given, [&](int k) FN_INLINE { return std::pair<V, V>(load(centre + k), load(inverse + k)); });
      else if (bare)
        each([](Index) FN_INLINE { return V{}; }, inner);
      else
        each(given, inner);
    });
  }
};

// Interpolation at the black points of row i, which is all that the relaxation of red ones reads: the mean of a and b.
template <int kC, From kFrom>
struct TakeBlack {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, const T* a, const T* b, Index step) {
    using V = Vector<T>;
    const Index row = i * l->pitch + (1 - (i & 1)) * l->half;
    T* const u = x->u + row;
    const T* const inverse = l->inverse + row;
    l->each_run(i, [&](Run run) FN_INLINE {
      for (int k = run.from * kLanes; k < run.to * kLanes; k += kLanes) {
        const auto some = (run.kind == Kind::other ? load(inverse + k) : V{} + T(1)) > T(0);
        for (int c = 0; c < kC; ++c) {
          const V v = T(0.5) * (load(a + c * step + k) + load(b + c * step + k));
          T* const to = u + c * x->step + k;
          store<T>(to, (kFrom == From::corrections ? load(to) : V{}) + (some ? v : V{}));
        }
      }
    });
  }
};

// ---- levels above: nine points, four colours

// Where the stencils of half h of a row and of the points beside it begin.
template <int h, class T>
struct NinePoints {
  const T *centre, *inverse, *west, *east, *north, *south, *north_west, *north_east, *south_west, *south_east;

  FN_BODY NinePoints(const Level<T>& l, int i) {
    const Index own = i * l.pitch + h * l.half, beside = i * l.pitch + (1 - h) * l.half + h;
    centre = l.centre + own;
    inverse = l.inverse + own;
    west = l.east + beside - 1;
    east = l.east + own;
    north = l.south + own - l.pitch;
    south = l.south + own;
    north_west = l.south_east + beside - 1 - l.pitch;
    north_east = l.south_west + beside - l.pitch;
    south_west = l.south_west + own;
    south_east = l.south_east + own;
  }
};

// f(c, k, b - sum of the neighbours' shares, centre, inverse) for the groups of points of half h of row i.
template <int kC, int h, class T, class F>
FN_BODY void each_nine(const Level<T>& l, const Unknowns<T>& x, int i, F f) {
  using V = Vector<T>;
  const Index row = i * l.pitch + h * l.half;
  const T *const own = x.u + row, *const other = x.u + i * l.pitch + (1 - h) * l.half, *const b = x.b + row;
  l.each_run(i, [&](Run run) FN_INLINE {
    const int from = run.from * kLanes, to = run.to * kLanes;
    if (run.kind == Kind::inner) {
      const V side = V{} + l.inner.east, corner = V{} + l.inner.south_east;
      for (int k = from; k < to; k += kLanes)
        for (int c = 0; c < kC; ++c) {
          const Index at = c * x.step + k;
          const Beside<h, T> here(other, at), above(other, at - l.pitch), below(other, at + l.pitch);
          const V sides = (here.west + here.east) + (load(own + at - l.pitch) + load(own + at + l.pitch));
          const V corners = (above.west + above.east) + (below.west + below.east);
          f(c, k, load(b + at) - (side * sides + corner * corners), V{} + l.inner.centre, V{} + l.inner_inverse);
        }
    } else {
      const NinePoints<h, T> p(l, i);
      for (int k = from; k < to; k += kLanes)
        for (int c = 0; c < kC; ++c) {
          const Index at = c * x.step + k;
          const Beside<h, T> here(other, at), above(other, at - l.pitch), below(other, at + l.pitch);
          V sum = load(p.west + k) * here.west + load(p.east + k) * here.east;
          V more = load(p.north + k) * load(own + at - l.pitch) + load(p.south + k) * load(own + at + l.pitch);
          sum += load(p.north_west + k) * above.west + load(p.north_east + k) * above.east;
          more += load(p.south_west + k) * below.west + load(p.south_east + k) * below.east;
          f(c, k, load(b + at) - (sum + more), load(p.centre + k), load(p.inverse + k));
        }
    }
  });
}

template <int kC>
struct RelaxNine {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, bool odd_first) {
    if (odd_first) of_half<1>(*l, *x, i);
    of_half<0>(*l, *x, i);
    if (!odd_first) of_half<1>(*l, *x, i);
  }
  template <int h, class T>
  FN_BODY static void of_half(const Level<T>& l, const Unknowns<T>& x, int i) {
    T* const own = x.u + i * l.pitch + h * l.half;
    const T factor = h == 1 && (i & 1) ? T(1) : T(kCoarseFactor);
    each_nine<kC, h>(l, x, i, [&](int c, int k, Vector<T> rest, Vector<T>, Vector<T> inverse) FN_INLINE {
      T* const to = own + c * x.step + k;
      const Vector<T> old = load(to);
      store<T>(to, old + factor * (rest * inverse - old));
    });
  }
};

template <int kC>
struct NineResidual {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, T* to, Index step) {
    for (int c = 0; c < kC; ++c) l->clear_row(to + c * step);
    of_half<0>(*l, *x, i, to, step);
    if ((i & 1) == 0) of_half<1>(*l, *x, i, to + l->half, step);  // those relaxed last have none
  }
  template <int h, class T>
  FN_BODY static void of_half(const Level<T>& l, const Unknowns<T>& x, int i, T* to, Index step) {
    const T* const own = x.u + i * l.pitch + h * l.half;
    each_nine<kC, h>(l, x, i, [&](int c, int k, Vector<T> rest, Vector<T> centre, Vector<T>) FN_INLINE {
      store<T>(to + c * step + k, rest - centre * load(own + c * x.step + k));
    });
  }
};

// Interpolation at row i, which lies between rows a and b of the next level.
template <int kC, From kFrom>
struct TakeRow {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, const T* a, const T* b, Index step) {
    using V = Vector<T>;
    T* const u = x->u + i * l->pitch;
    const T* const inverse = l->inverse + i * l->pitch;
    l->each_run(i, [&](Run run) FN_INLINE {
      const bool inner = run.kind == Kind::inner;
      for (int c = 0; c < kC; ++c)
        for (int k = run.from * kLanes; k < run.to * kLanes; k += kLanes) {
          const Index at = c * step + k;
          const V first = T(0.5) * (load(a + at) + load(b + at)), next = T(0.5) * (load(a + at + 1) + load(b + at + 1));
          const V v[2] = {first, T(0.5) * (first + next)};
          for (int h = 0; h < 2; ++h) {
            T* const to = u + c * x->step + h * l->half + k;
            const auto some = (inner ? V{} + T(1) : load(inverse + h * l->half + k)) > T(0);
            store<T>(to, (kFrom == From::corrections ? load(to) : V{}) + (some ? v[h] : V{}));
          }
        }
    });
  }
};

// Largest |u| of a channel, NaN if anything is not finite.
struct Largest {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const T* field, T* found) {
    using V = Vector<T>;
    V most{}, nothing{};
    for (int i = 0; i < l->ny; ++i)
      l->each_run(i, [&](Run run) FN_INLINE {
        for (int h = 0; h < 2; ++h) {
          const T* const u = field + i * l->pitch + h * l->half;
          for (int k = run.from * kLanes; k < run.to * kLanes; k += kLanes) {
            const V v = load(u + k), size = v < T(0) ? -v : v;
            most = size > most ? size : most;
            nothing += v * T(0);
          }
        }
      });
    T largest = 0, sum = 0;
    for (int k = 0; k < kLanes; ++k) {
      largest = most[k] > largest ? most[k] : largest;
      sum += nothing[k];
    }
    *found = largest + sum;
  }
};

// ---- cycles

// Of kC channels side by side: what is done for a row is shared, and each has enough to keep the processor busy.
template <class T, int kC>
class Solver {
 public:
  Solver(const Grid<T>& grid, bool bare, const Unknowns<T>* unknowns, T* scratch)
      : grid_(grid), bare_(bare), x_(unknowns), width_(row_scratch(grid)) {
    for (int k = 0; k < 2; ++k) natural_[k] = scratch + k * kC * width_ + kLanes;
    for (int k = 0; k < 4; ++k) residual_[k] = scratch + (2 + k) * kC * width_ + kLanes;
    std::memset(scratch, 0, std::size_t(6 * kC * width_) * sizeof(T));
  }
  static Index scratch(const Grid<T>& grid) { return 6 * kC * row_scratch(grid); }

  // Full multigrid for the right side b of level 0, and one cycle. `changes`: the largest corrections of the cycle
  // within full multigrid and of the one after, [2, kC].
  void start(T* changes) {
    const int last = grid_.levels - 1;
    for (int n = 0; n < last; ++n) restrict_right_side(n);
    clear(last);
    relax_coarsest();
    for (int n = last - 1; n > 0; --n) {
      coarse_pass<From::values>(n);
      descend(n + 1);
      coarse_pass<From::corrections>(n);
    }
    finest_pass<From::values, 1, true>();
    descend(1);
    largest(1, changes);
    finest_pass<From::corrections, 2, true>();
    descend(1);
    largest(1, changes + kC);
    finest_pass<From::corrections, 1, false>();
  }
  // One more cycle: its corrections, [kC].
  void cycle(T* changes) {
    finest_pass<From::nothing, 1, true>();
    descend(1);
    largest(1, changes);
    finest_pass<From::corrections, 1, false>();
  }
  void largest(int n, T* found) const {
    for (int c = 0; c < kC; ++c) run<Largest>(level(n), static_cast<const T*>(x_[n].u + c * x_[n].step), found + c);
  }

 private:
  const Grid<T>& grid_;
  bool bare_;  // b of inner runs is 0 at level 0
  const Unknowns<T>* x_;
  Index width_;
  T* natural_[2];   // [kC, width_] rows of the next level in columns' order
  T* residual_[4];  // [kC, width_]

  static Index row_scratch(const Grid<T>& grid) { return grid.level[0].pitch + 4 * kLanes; }
  const Level<T>* level(int n) const { return &grid_.level[n]; }

  // One cycle on each of the levels from n, from zeros.
  void descend(int n) {
    const int last = grid_.levels - 1;
    for (int k = n; k < last; ++k) coarse_pass<From::nothing>(k);
    relax_coarsest();
    for (int k = last - 1; k >= n; --k) coarse_pass<From::corrections>(k);
  }

  void clear(int n) {
    const Level<T>& l = grid_.level[n];
    for (int c = 0; c < kC; ++c)
      for (int i = 0; i < l.ny; ++i) l.clear_row(x_[n].u + c * x_[n].step + i * l.pitch);
  }
  void clear_residual(int n, int i) {
    for (int c = 0; c < kC; ++c) grid_.level[n].clear_row(residual_[i & 3] + c * width_);
  }

  void restrict_right_side(int n) {
    const Level<T>&fine = grid_.level[n], &l = grid_.level[n + 1];
    for (int i = 0; i < l.ny; ++i) {
      const T* const here = x_[n].b + 2 * i * fine.pitch;
      run<Restrict<kC, Sparse::no, false>>(&l, x_ + n + 1, i, here - fine.pitch, here, here + fine.pitch, fine.half,
                                           x_[n].step);
    }
  }
  template <Sparse kSparse>
  void restrict_residual(int n, int i) {
    const T *const above = residual_[(2 * i - 1) & 3], *const here = residual_[(2 * i) & 3];
    const T* const below = residual_[(2 * i + 1) & 3];
    run<Restrict<kC, kSparse, true>>(level(n + 1), x_ + n + 1, i, above, here, below, grid_.level[n].half, width_);
  }

  // The rows of level n + 1 that row i of level n lies between are in natural_ when rows come in order.
  void spread_for(int n, int i) {
    if (i == 0) run<Spread<kC>>(level(n + 1), x_ + n + 1, 0, natural_[0], width_);
    if (i & 1) run<Spread<kC>>(level(n + 1), x_ + n + 1, (i + 1) / 2, natural_[((i + 1) / 2) & 1], width_);
  }
  template <From kFrom>
  void take_black(int i) {
    spread_for(0, i);
    const T *const a = natural_[(i >> 1) & 1], *const b = i & 1 ? natural_[((i + 1) >> 1) & 1] : a + 1;
    run<TakeBlack<kC, kFrom>>(level(0), x_, i, a, b, width_);
  }
  template <From kFrom>
  void take_row(int n, int i) {
    spread_for(n, i);
    const T *const a = natural_[(i >> 1) & 1], *const b = natural_[((i + 1) >> 1) & 1];
    run<TakeRow<kC, kFrom>>(level(n), x_ + n, i, a, b, width_);
  }

  template <From kFrom, int kSweeps, bool kResidual>
  void finest_pass() {
    const Level<T>& l = grid_.level[0];
    const int ny = l.ny, rows = ny + 2 - (ny & 1);          // with those that end the last coarse row
    constexpr int kFirst = kFrom == From::nothing ? 0 : 1;  // rows behind
    constexpr int kBehind = kFirst + 2 * kSweeps;
    const auto inside = [ny](int i) { return i >= 0 && i < ny; };
    if constexpr (kResidual) clear_residual(0, 3);
    for (int r = 0; r < rows + kBehind; ++r) {
      if constexpr (kFrom != From::nothing)
        if (r < ny) take_black<kFrom>(r);
      for (int s = 0; s < kSweeps; ++s) {
        const int i = r - kFirst - 2 * s;
        if (inside(i)) {
          if (kFrom == From::nothing || s > 0)
            run<RelaxFive<kC, true>>(&l, x_, i, i & 1, bare_);
          else
            run<RelaxFive<kC, false>>(&l, x_, i, i & 1, bare_);
        }
        if (inside(i - 1)) run<RelaxFive<kC, false>>(&l, x_, i - 1, i & 1, bare_);
      }
      if constexpr (kResidual) {
        const int i = r - kBehind;
        if (i < 0) continue;
        if (i < ny)
          run<RedResidual<kC>>(&l, x_, i, bare_, residual_[i & 3], width_);
        else
          clear_residual(0, i);
        if (i & 1) restrict_residual<Sparse::red>(0, i >> 1);
      }
    }
  }

  // One relaxation. Corrections come last in a cycle; otherwise the residual follows.
  template <From kFrom>
  void coarse_pass(int n) {
    constexpr bool kResidual = kFrom != From::corrections;
    const Level<T>& l = grid_.level[n];
    const int ny = l.ny, last = ny / 2 * 2 + 2;
    if constexpr (kResidual) clear_residual(n, 3);
    if constexpr (kFrom != From::nothing) take_row<kFrom>(n, 0);
    for (int i = 0; i <= last; i += 2) {
      for (int k = i + 1; k <= i + 2 && k < ny && kFrom != From::nothing; ++k) take_row<kFrom>(n, k);
      if (i < ny) run<RelaxNine<kC>>(&l, x_ + n, i, false);
      if (i == 0) continue;
      if (i - 1 < ny) run<RelaxNine<kC>>(&l, x_ + n, i - 1, false);
      if constexpr (kResidual) {
        for (int k = i - 2; k < i; ++k)
          if (k < ny)
            run<NineResidual<kC>>(&l, x_ + n, k, residual_[k & 3], width_);
          else
            clear_residual(n, k);
        restrict_residual<Sparse::last>(n, (i - 2) / 2);
      }
    }
  }

  void relax_coarsest() {
    const int n = grid_.levels - 1, ny = grid_.level[n].ny;
    for (int s = 0; s < kCoarsestSweeps; ++s)
      for (const bool back : {false, true})
        for (const int start : {int(back), int(!back)})
          for (int i = start; i < ny; i += 2) run<RelaxNine<kC>>(level(n), x_ + n, i, back);
  }
};

}  // namespace fastnuggets::poisson

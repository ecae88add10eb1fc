// Multigrid on the levels of poisson_cpu_grid.h, one channel at a time. A pass goes over a level's rows once and does
// all that lies between two visits of the next level: interpolation, relaxations, residual, restriction, each some rows
// behind the other.
#pragma once

#include <cmath>
#include <limits>

#include "blend/poisson_cpu_grid.h"

namespace fastnuggets::poisson {

template <class T>
struct Unknowns {
  T *u, *b;  // at point (0, 0)
};

enum class From : int { nothing, values, corrections };  // what a pass takes from the next level at its start

// ---- rows. `x` are the level's unknowns.

// u in columns' order. Runs leave the rest of a row 0.
struct Spread {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, T* to) {
    const T* const u = x->u + i * l->pitch;
    for (int k = 0; k < l->blocks * kLanes; k += kLanes) interleave<T>(load(u + k), load(u + l->half + k), to + 2 * k);
  }
};

// Row i of b from the residuals (or right sides) of rows 2i - 1, 2i, 2i + 1 of the level below, even columns first, the
// odd ones at `half`. `kRed`: only those of red points are not 0. `kClears`: u = 0.
template <bool kRed, bool kClears>
struct Restrict {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, const T* above, const T* here, const T* below,
                          Index half) {
    using V = Vector<T>;
    const auto sum = [&](int k) FN_INLINE {  // kLanes points from k in columns' order
      const T *const a = above + half + k, *const b = below + half + k;
      const V corners = (load(a - 1) + load(a)) + (load(b - 1) + load(b));
      if constexpr (kRed) {
        return load(here + k) + T(0.25) * corners;
      } else {
        const V sides = (load(here + half + k - 1) + load(here + half + k)) + (load(above + k) + load(below + k));
        return load(here + k) + T(0.5) * sides + T(0.25) * corners;
      }
    };
    T* const b = x->b + i * l->pitch;
    T* const u = x->u + i * l->pitch;
    l->each_run(i, [&](Run run) FN_INLINE {
      for (int k = run.from * kLanes; k < run.to * kLanes; k += kLanes) {
        split<T>(sum(2 * k), sum(2 * k + kLanes), b + k, b + l->half + k);
        if (kClears) store<T>(u + k, V{});
        if (kClears) store<T>(u + l->half + k, V{});
      }
    });
  }
};

// ---- level 0: five points, red and black

// Half h of a row: its own points, and the four neighbours of the first.
template <class T>
struct Five {
  T* own;
  const T *west, *east, *north, *south, *right_side, *centre, *inverse;

  FN_BODY Five(const Level<T>& l, const Unknowns<T>& x, int i, int h) {
    const Index row = i * l.pitch + h * l.half;
    const T* const other = x.u + i * l.pitch + (1 - h) * l.half;
    own = x.u + row;
    west = other + h - 1;
    east = other + h;
    north = own - l.pitch;
    south = own + l.pitch;
    right_side = x.b + row;
    centre = l.centre + row;
    inverse = l.inverse + row;
  }
};

// `bare`: b of inner runs is 0.
template <bool kOver>
struct RelaxFive {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, int h, bool bare) {
    using V = Vector<T>;
    const Five<T> p(*l, *x, i, h);
    l->each_run(i, [&](Run run) FN_INLINE {
      const int from = run.from * kLanes, to = run.to * kLanes;
      const auto put = [&](int k, V b, V inverse) FN_INLINE {
        V found = relax5(b, load(p.north + k), load(p.south + k), load(p.west + k), load(p.east + k), inverse);
        if constexpr (kOver) {
          const V old = load(p.own + k);
          found = old + T(kRedFactor) * (found - old);
        }
        store<T>(p.own + k, found);
      };
      if (run.kind == Kind::other)
        for (int k = from; k < to; k += kLanes) put(k, load(p.right_side + k), load(p.inverse + k));
      else if (bare)
        for (int k = from; k < to; k += kLanes) put(k, V{}, V{} + T(0.25));
      else
        for (int k = from; k < to; k += kLanes) put(k, load(p.right_side + k), V{} + T(0.25));
    });
  }
};

struct RedResidual {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, bool bare, T* to) {
    using V = Vector<T>;
    const Five<T> p(*l, *x, i, i & 1);
    l->clear_row(to);
    to += (i & 1) * l->half;
    l->each_run(i, [&](Run run) FN_INLINE {
      const int first = run.from * kLanes, last = run.to * kLanes;
      const auto sum = [&](int k) FN_INLINE {
        return (load(p.north + k) + load(p.south + k)) + (load(p.west + k) + load(p.east + k));
      };
      if (run.kind == Kind::other) {
        for (int k = first; k < last; k += kLanes) {
          const V c = load(p.centre + k);
          const V r = load(p.right_side + k) + sum(k) - c * load(p.own + k);
          store<T>(to + k, c > T(0) ? r : V{});
        }
      } else if (bare) {
        for (int k = first; k < last; k += kLanes) store<T>(to + k, sum(k) - T(4) * load(p.own + k));
      } else {
        for (int k = first; k < last; k += kLanes)
          store<T>(to + k, load(p.right_side + k) + sum(k) - T(4) * load(p.own + k));
      }
    });
  }
};

// Interpolation at the black points of row i, which is all that the relaxation of red ones reads: the mean of a and b.
template <From kFrom>
struct TakeBlack {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, const T* a, const T* b) {
    using V = Vector<T>;
    const Index row = i * l->pitch + (1 - (i & 1)) * l->half;
    T* const u = x->u + row;
    const T* const inverse = l->inverse + row;
    l->each_run(i, [&](Run run) FN_INLINE {
      for (int k = run.from * kLanes; k < run.to * kLanes; k += kLanes) {
        V v = T(0.5) * (load(a + k) + load(b + k));
        if (run.kind == Kind::other) v = load(inverse + k) > T(0) ? v : V{};
        store<T>(u + k, kFrom == From::corrections ? load(u + k) + v : v);
      }
    });
  }
};

// ---- levels above: nine points, four colours

template <class T>
struct Nine {
  T* own;
  const T *west, *east, *north, *south, *north_west, *north_east, *south_west, *south_east;

  FN_BODY Nine(const Level<T>& l, T* field, int i, int h) {
    own = field + i * l.pitch + h * l.half;
    east = field + i * l.pitch + (1 - h) * l.half + h;
    west = east - 1;
    north = own - l.pitch;
    south = own + l.pitch;
    north_west = west - l.pitch;
    north_east = east - l.pitch;
    south_west = west + l.pitch;
    south_east = east + l.pitch;
  }
};

// f(k, b - sum of the neighbours' shares, centre, inverse) for the groups of points of half h of row i.
template <class T, class F>
FN_BODY void each_nine(const Level<T>& l, const Unknowns<T>& x, int i, int h, F f) {
  using V = Vector<T>;
  const Nine<T> p(l, x.u, i, h);
  const Index row = i * l.pitch + h * l.half;
  const T* const b = x.b + row;
  l.each_run(i, [&](Run run) FN_INLINE {
    const int from = run.from * kLanes, to = run.to * kLanes;
    if (run.kind == Kind::inner) {
      const V side = V{} + l.inner.east, corner = V{} + l.inner.south_east;
      for (int k = from; k < to; k += kLanes) {
        const V sides = (load(p.west + k) + load(p.east + k)) + (load(p.north + k) + load(p.south + k));
        const V corners =
            (load(p.north_west + k) + load(p.north_east + k)) + (load(p.south_west + k) + load(p.south_east + k));
        f(k, load(b + k) - (side * sides + corner * corners), V{} + l.inner.centre, V{} + l.inner_inverse);
      }
    } else {
      const Nine<T> e(l, l.east, i, h), se(l, l.south_east, i, h), sw(l, l.south_west, i, h);
      const T* const south = l.south + row;
      for (int k = from; k < to; k += kLanes) {
        V sum = load(e.west + k) * load(p.west + k) + load(e.own + k) * load(p.east + k);
        sum += load(south - l.pitch + k) * load(p.north + k) + load(south + k) * load(p.south + k);
        sum += load(se.north_west + k) * load(p.north_west + k) + load(sw.north_east + k) * load(p.north_east + k);
        sum += load(sw.own + k) * load(p.south_west + k) + load(se.own + k) * load(p.south_east + k);
        f(k, load(b + k) - sum, load(l.centre + row + k), load(l.inverse + row + k));
      }
    }
  });
}

struct RelaxNine {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, bool odd_first) {
    for (int k = 0; k < 2; ++k) {
      const int h = odd_first ? 1 - k : k;
      T* const own = x->u + i * l->pitch + h * l->half;
      each_nine(*l, *x, i, h, [&](int at, Vector<T> rest, Vector<T>, Vector<T> inverse) FN_INLINE {
        const Vector<T> old = load(own + at);
        store<T>(own + at, old + T(kCoarseFactor) * (rest * inverse - old));
      });
    }
  }
};

struct NineResidual {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, T* to) {
    l->clear_row(to);
    for (int h = 0; h < 2; ++h) {
      T* const out = to + h * l->half;
      const T* const own = x->u + i * l->pitch + h * l->half;
      each_nine(*l, *x, i, h, [&](int k, Vector<T> rest, Vector<T> centre, Vector<T>) FN_INLINE {
        store<T>(out + k, rest - centre * load(own + k));
      });
    }
  }
};

// Interpolation at row i, which lies between rows a and b of the next level.
template <From kFrom>
struct TakeRow {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, int i, const T* a, const T* b) {
    using V = Vector<T>;
    T* const u = x->u + i * l->pitch;
    const T* const inverse = l->inverse + i * l->pitch;
    l->each_run(i, [&](Run run) FN_INLINE {
      for (int k = run.from * kLanes; k < run.to * kLanes; k += kLanes) {
        const V first = T(0.5) * (load(a + k) + load(b + k)), next = T(0.5) * (load(a + k + 1) + load(b + k + 1));
        V v[2] = {first, T(0.5) * (first + next)};
        for (int h = 0; h < 2; ++h) {
          T* const to = u + h * l->half + k;
          if (run.kind == Kind::other) v[h] = load(inverse + h * l->half + k) > T(0) ? v[h] : V{};
          store<T>(to, kFrom == From::corrections ? load(to) + v[h] : v[h]);
        }
      }
    });
  }
};

// Largest |u|, NaN if anything is not finite.
struct Largest {
  template <class T>
  FN_BODY static void run(const Level<T>* l, const Unknowns<T>* x, T* found) {
    using V = Vector<T>;
    V most{}, nothing{};
    for (int i = 0; i < l->ny; ++i)
      l->each_run(i, [&](Run run) FN_INLINE {
        for (int h = 0; h < 2; ++h) {
          const T* const u = x->u + i * l->pitch + h * l->half;
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

template <class T>
class Solver {
 public:
  Solver(const Grid<T>& grid, bool bare, const Unknowns<T>* unknowns, T* scratch)
      : grid_(grid), bare_(bare), x_(unknowns) {
    const Index width = row_scratch(grid);
    for (int k = 0; k < 2; ++k) natural_[k] = scratch + k * width + kLanes;
    for (int k = 0; k < 4; ++k) residual_[k] = scratch + (2 + k) * width + kLanes;
    std::memset(scratch, 0, std::size_t(6 * width) * sizeof(T));
  }
  static Index scratch(const Grid<T>& grid) { return 6 * row_scratch(grid); }

  // Solves for the right side b of level 0. Returns the estimate of the largest error; of the largest value, if
  // `relative`, to which the tolerance then refers.
  T solve(T tolerance, int max_cycles, bool relative) {
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
    T before = correct_finest();
    if (max_cycles < 1) {
      finest_pass<From::corrections, 1, false>();
      return std::numeric_limits<T>::infinity();
    }
    finest_pass<From::corrections, 2, true>();
    for (int cycle = 1;; ++cycle) {
      const T change = correct_finest();
      finest_pass<From::corrections, 1, false>();
      T error = T(error_left(float(change), float(before)));
      if (relative && error > T(0)) error /= largest(0);
      if (!(error > tolerance) || cycle >= max_cycles) return error;
      before = change;
      finest_pass<From::nothing, 1, true>();
    }
  }

 private:
  const Grid<T>& grid_;
  bool bare_;  // b of inner runs is 0 at level 0
  const Unknowns<T>* x_;
  T* natural_[2];  // rows of the next level in columns' order
  T* residual_[4];

  static Index row_scratch(const Grid<T>& grid) { return grid.level[0].pitch + 4 * kLanes; }
  const Level<T>* level(int n) const { return &grid_.level[n]; }

  T correct_finest() {
    descend(1);
    return largest(1);
  }
  // One cycle on each of the levels from n, from zeros.
  void descend(int n) {
    const int last = grid_.levels - 1;
    for (int k = n; k < last; ++k) coarse_pass<From::nothing>(k);
    relax_coarsest();
    for (int k = last - 1; k >= n; --k) coarse_pass<From::corrections>(k);
  }

  T largest(int n) const {
    T found;
    run<Largest>(level(n), x_ + n, &found);
    return found;
  }

  void clear(int n) {
    const Level<T>& l = grid_.level[n];
    for (int i = 0; i < l.ny; ++i) l.clear_row(x_[n].u + i * l.pitch);
  }

  void restrict_right_side(int n) {
    const Level<T>&fine = grid_.level[n], &l = grid_.level[n + 1];
    for (int i = 0; i < l.ny; ++i) {
      const T* const here = x_[n].b + 2 * i * fine.pitch;
      run<Restrict<false, false>>(&l, x_ + n + 1, i, here - fine.pitch, here, here + fine.pitch, fine.half);
    }
  }
  template <bool kRed>
  void restrict_residual(int n, int i) {
    run<Restrict<kRed, true>>(level(n + 1), x_ + n + 1, i, std::as_const(residual_[(2 * i - 1) & 3]),
                              std::as_const(residual_[(2 * i) & 3]), std::as_const(residual_[(2 * i + 1) & 3]),
                              grid_.level[n].half);
  }

  // The rows of level n + 1 that row i of level n lies between are in natural_ when rows come in order.
  void spread_for(int n, int i) {
    if (i == 0) run<Spread>(level(n + 1), x_ + n + 1, 0, natural_[0]);
    if (i & 1) run<Spread>(level(n + 1), x_ + n + 1, (i + 1) / 2, natural_[((i + 1) / 2) & 1]);
  }
  template <From kFrom>
  void take_black(int i) {
    spread_for(0, i);
    const T* const a = natural_[(i >> 1) & 1];
    run<TakeBlack<kFrom>>(level(0), x_, i, a, i & 1 ? std::as_const(natural_[((i + 1) >> 1) & 1]) : a + 1);
  }
  template <From kFrom>
  void take_row(int n, int i) {
    spread_for(n, i);
    run<TakeRow<kFrom>>(level(n), x_ + n, i, std::as_const(natural_[(i >> 1) & 1]),
                        std::as_const(natural_[((i + 1) >> 1) & 1]));
  }

  template <From kFrom, int kSweeps, bool kResidual>
  void finest_pass() {
    const Level<T>& l = grid_.level[0];
    const int ny = l.ny, rows = ny + 2 - (ny & 1);          // with those that end the last coarse row
    constexpr int kFirst = kFrom == From::nothing ? 0 : 1;  // rows behind
    constexpr int kBehind = kFirst + 2 * kSweeps;
    const auto inside = [ny](int i) { return i >= 0 && i < ny; };
    if constexpr (kResidual) l.clear_row(residual_[3]);
    for (int r = 0; r < rows + kBehind; ++r) {
      if constexpr (kFrom != From::nothing)
        if (r < ny) take_black<kFrom>(r);
      for (int s = 0; s < kSweeps; ++s) {
        const int i = r - kFirst - 2 * s;
        if (inside(i)) {
          if (kFrom == From::nothing || s > 0)
            run<RelaxFive<true>>(&l, x_, i, i & 1, bare_);
          else
            run<RelaxFive<false>>(&l, x_, i, i & 1, bare_);
        }
        if (inside(i - 1)) run<RelaxFive<false>>(&l, x_, i - 1, i & 1, bare_);
      }
      if constexpr (kResidual) {
        const int i = r - kBehind;
        if (i < 0) continue;
        if (i < ny)
          run<RedResidual>(&l, x_, i, bare_, residual_[i & 3]);
        else
          l.clear_row(residual_[i & 3]);
        if (i & 1) restrict_residual<true>(0, i >> 1);
      }
    }
  }

  // One relaxation. Corrections come last in a cycle; otherwise the residual follows.
  template <From kFrom>
  void coarse_pass(int n) {
    constexpr bool kResidual = kFrom != From::corrections;
    const Level<T>& l = grid_.level[n];
    const int ny = l.ny, last = ny / 2 * 2 + 2;
    if constexpr (kResidual) l.clear_row(residual_[3]);
    if constexpr (kFrom != From::nothing) take_row<kFrom>(n, 0);
    for (int i = 0; i <= last; i += 2) {
      for (int k = i + 1; k <= i + 2 && k < ny && kFrom != From::nothing; ++k) take_row<kFrom>(n, k);
      if (i < ny) run<RelaxNine>(&l, x_ + n, i, false);
      if (i == 0) continue;
      if (i - 1 < ny) run<RelaxNine>(&l, x_ + n, i - 1, false);
      if constexpr (kResidual) {
        for (int k = i - 2; k < i; ++k)
          if (k < ny)
            run<NineResidual>(&l, x_ + n, k, residual_[k & 3]);
          else
            l.clear_row(residual_[k & 3]);
        restrict_residual<false>(n, (i - 2) / 2);
      }
    }
  }

  void relax_coarsest() {
    const int n = grid_.levels - 1, ny = grid_.level[n].ny;
    for (int s = 0; s < kCoarsestSweeps; ++s)
      for (const bool back : {false, true})
        for (const int start : {int(back), int(!back)})
          for (int i = start; i < ny; i += 2) run<RelaxNine>(level(n), x_ + n, i, back);
  }
};

}  // namespace fastnuggets::poisson

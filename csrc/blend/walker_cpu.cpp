// The random walker on the CPU, in float64: a label is worked out by one thread, so the bits do not depend on their
// number.
//
// Weights may differ by six orders of magnitude from one edge to the next, and any few pixels may be an island behind
// weak edges. A grid of every second pixel does not see these, whatever its interpolation. So levels are made by
// joining each point to the neighbour it hangs on most, after Y. Notay, "An aggregation-based algebraic multigrid
// method", ETNA 37, 2010, with a relaxation after every pairing: that settles an island once it is one point.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "blend/walker_op.h"

namespace fastnuggets::walker {
namespace {

using Index = std::int64_t;
using Numbers = std::vector<double>;

constexpr Index kCoarsest = 100;  // points of the last level at most, which is solved directly

// A graph: what hangs on point p, and with what weight, is in places first[p] to first[p + 1].
struct Level {
  std::vector<Index> first, other;
  Numbers weight, diagonal;   // the matrix has -weight beside its diagonal
  std::vector<Index> parent;  // point of the next level

  Index points() const { return Index(diagonal.size()); }
  double rest(Index p, const Numbers& u, const Numbers& b) const {  // b + what the neighbours give
    double sum = b[std::size_t(p)];
    for (Index k = first[std::size_t(p)]; k < first[std::size_t(p) + 1]; ++k)
      sum += weight[std::size_t(k)] * u[std::size_t(other[std::size_t(k)])];
    return sum;
  }
};

// Pairs of points: each with the free neighbour it hangs on most. If others hold it four times as fast, or none is
// free, it joins the pair of the one that holds it most.
std::vector<Index> pairs_of(const Level& l, Index& count) {
  std::vector<Index> parent(std::size_t(l.points()), -1);
  count = 0;
  for (Index p = 0; p < l.points(); ++p) {
    if (parent[std::size_t(p)] >= 0) continue;
    Index best = -1, free = -1;
    double most = 0, most_free = 0;
    for (Index k = l.first[std::size_t(p)]; k < l.first[std::size_t(p) + 1]; ++k) {
      const Index q = l.other[std::size_t(k)];
      const double weight = l.weight[std::size_t(k)];
      if (weight > most) {
        most = weight;
        best = q;
      }
      if (weight > most_free && parent[std::size_t(q)] < 0) {
        most_free = weight;
        free = q;
      }
    }
    if (best >= 0 && 4 * most_free < most) {
      parent[std::size_t(p)] = parent[std::size_t(best)];
      continue;
    }
    parent[std::size_t(p)] = count;
    if (free >= 0) parent[std::size_t(free)] = count;
    ++count;
  }
  return parent;
}

// P' A P, where P copies a point's value to all that were joined in it.
Level joined(const Level& fine, const std::vector<Index>& parent, Index count) {
  std::vector<Index> begin(std::size_t(count) + 1, 0), members(parent.size());
  for (const Index q : parent) ++begin[std::size_t(q) + 1];
  for (std::size_t k = 1; k < begin.size(); ++k) begin[k] += begin[k - 1];
  std::vector<Index> next(begin.begin(), begin.end() - 1);
  for (std::size_t p = 0; p < parent.size(); ++p) members[std::size_t(next[std::size_t(parent[p])]++)] = Index(p);
  Level l;
  l.first.push_back(0);
  l.diagonal.assign(std::size_t(count), 0);
  std::vector<Index> place(std::size_t(count), -1);
  for (Index c = 0; c < count; ++c) {
    for (Index m = begin[std::size_t(c)]; m < begin[std::size_t(c) + 1]; ++m) {
      const Index p = members[std::size_t(m)];
      l.diagonal[std::size_t(c)] += fine.diagonal[std::size_t(p)];
      for (Index k = fine.first[std::size_t(p)]; k < fine.first[std::size_t(p) + 1]; ++k) {
        const Index to = parent[std::size_t(fine.other[std::size_t(k)])];
        const double weight = fine.weight[std::size_t(k)];
        if (to == c) {
          l.diagonal[std::size_t(c)] -= weight;
        } else if (place[std::size_t(to)] >= l.first.back()) {
          l.weight[std::size_t(place[std::size_t(to)])] += weight;
        } else {
          place[std::size_t(to)] = Index(l.other.size());
          l.other.push_back(to);
          l.weight.push_back(weight);
        }
      }
    }
    l.first.push_back(Index(l.other.size()));
  }
  return l;
}

// Level 0 are the pixels that are no seeds, in their order; `number` is -1 at seeds.
Level pixels_of(const Walk& how, const std::vector<Index>& number) {
  Level l;
  l.first.push_back(0);
  for (Index i = 0; i < how.H; ++i)
    for (Index j = 0; j < how.W; ++j) {
      const Index p = i * how.W + j;
      if (number[std::size_t(p)] < 0) continue;
      double sum = 0;
      const auto add = [&](Index q, double weight) {
        sum += weight;
        if (number[std::size_t(q)] < 0) return;
        l.other.push_back(number[std::size_t(q)]);
        l.weight.push_back(weight);
      };
      if (i > 0) add(p - how.W, how.south[p - how.W]);
      if (j > 0) add(p - 1, how.east[p - 1]);
      if (j + 1 < how.W) add(p + 1, how.east[p]);
      if (i + 1 < how.H) add(p + how.W, how.south[p]);
      l.diagonal.push_back(sum);
      l.first.push_back(Index(l.other.size()));
    }
  return l;
}

std::vector<Level> levels_of(const Walk& how, const std::vector<Index>& number) {
  std::vector<Level> levels{pixels_of(how, number)};
  while (levels.back().points() > kCoarsest) {
    Level& fine = levels.back();
    Index count = 0;
    fine.parent = pairs_of(fine, count);
    if (count == fine.points()) break;  // nothing hangs together
    Level next = joined(fine, fine.parent, count);
    levels.push_back(std::move(next));
  }
  return levels;
}

// Cholesky's factor of a level's matrix, lower, row after row; where a pivot is 0 the row is 0.
Numbers factor_of(const Level& l) {
  const std::size_t n = std::size_t(l.points());
  Numbers f(n * n, 0);
  for (std::size_t p = 0; p < n; ++p) {
    f[p * n + p] = l.diagonal[p];
    for (Index k = l.first[p]; k < l.first[p + 1]; ++k)
      if (std::size_t(l.other[std::size_t(k)]) < p)
        f[p * n + std::size_t(l.other[std::size_t(k)])] -= l.weight[std::size_t(k)];
    for (std::size_t q = 0; q <= p; ++q) {
      double sum = f[p * n + q];
      for (std::size_t k = 0; k < q; ++k) sum -= f[p * n + k] * f[q * n + k];
      if (q < p)
        f[p * n + q] = f[q * n + q] > 0 ? sum / f[q * n + q] : 0;
      else
        f[p * n + q] = sum > 1e-14 * l.diagonal[p] ? std::sqrt(sum) : 0;
    }
  }
  return f;
}
void solve_directly(const Numbers& f, const Numbers& b, Numbers& u) {
  const std::size_t n = b.size();
  for (std::size_t p = 0; p < n; ++p) {
    double sum = b[p];
    for (std::size_t k = 0; k < p; ++k) sum -= f[p * n + k] * u[k];
    u[p] = f[p * n + p] > 0 ? sum / f[p * n + p] : 0;
  }
  for (std::size_t p = n; p-- > 0;) {
    u[p] = f[p * n + p] > 0 ? u[p] / f[p * n + p] : 0;
    for (std::size_t k = 0; k < p; ++k) u[k] -= f[p * n + k] * u[p];
  }
}

// One label: conjugate gradients, each step with a W cycle that relaxes forth before and back after, so that it is
// symmetric.
class Label {
 public:
  Label(const std::vector<Level>& levels, const Numbers& factor)
      : levels_(levels), factor_(factor), n_(std::size_t(levels[0].points())) {
    for (const Level& l : levels) {
      u_.emplace_back(std::size_t(l.points()));
      b_.emplace_back(std::size_t(l.points()));
    }
    for (Numbers* field : {&solution, &direction_, &image_}) field->resize(n_);
    zeros_.resize(n_);
  }
  Numbers solution;

  // b is what the label's seeds give. Returns the estimate of the largest error: what the cycle makes of the rest.
  double solve(const Numbers& b, double tolerance, int max_steps) {
    b_[0] = b;
    std::fill(solution.begin(), solution.end(), 0);
    std::fill(direction_.begin(), direction_.end(), 0);
    double along = 0;
    for (int step = 0;; ++step) {
      std::fill(u_[0].begin(), u_[0].end(), 0);
      cycle(0);
      double error = 0, dot = 0, nothing = 0;  // nothing: NaN if anything is not finite
      for (std::size_t p = 0; p < n_; ++p) {
        error = std::max(error, std::abs(u_[0][p]));
        nothing += 0 * u_[0][p];
        dot += u_[0][p] * b_[0][p];
      }
      error = error / kShare + nothing;
      if (!(error > tolerance) || step >= max_steps) return error;
      const double keep = step == 0 ? 0 : dot / along;
      along = dot;
      double energy = 0;
      for (std::size_t p = 0; p < n_; ++p) direction_[p] = u_[0][p] + keep * direction_[p];
      for (std::size_t p = 0; p < n_; ++p) {
        image_[p] = levels_[0].diagonal[p] * direction_[p] - levels_[0].rest(Index(p), direction_, zeros_);
        energy += image_[p] * direction_[p];
      }
      const double size = dot / energy;
      for (std::size_t p = 0; p < n_; ++p) {
        solution[p] += size * direction_[p];
        b_[0][p] -= size * image_[p];
      }
    }
  }

 private:
  static constexpr double kShare = 0.1;  // of the error that a cycle is trusted to see

  const std::vector<Level>& levels_;
  const Numbers& factor_;  // of the last level
  std::size_t n_;
  std::vector<Numbers> u_, b_;  // of the cycle; b of level 0 is what is left
  Numbers direction_, image_, zeros_;

  void relax(std::size_t n, bool back) {
    const Level& l = levels_[n];
    for (Index k = 0; k < l.points(); ++k) {
      const Index p = back ? l.points() - 1 - k : k;
      if (l.diagonal[std::size_t(p)] > 0) u_[n][std::size_t(p)] = l.rest(p, u_[n], b_[n]) / l.diagonal[std::size_t(p)];
    }
  }

  void cycle(std::size_t n) {
    const Level& l = levels_[n];
    if (n + 1 == levels_.size()) return solve_directly(factor_, b_[n], u_[n]);
    relax(n, false);
    std::fill(b_[n + 1].begin(), b_[n + 1].end(), 0);
    std::fill(u_[n + 1].begin(), u_[n + 1].end(), 0);
    for (std::size_t p = 0; p < l.parent.size(); ++p)
      b_[n + 1][std::size_t(l.parent[p])] += l.rest(Index(p), u_[n], b_[n]) - l.diagonal[p] * u_[n][p];
    cycle(n + 1);
    if (n % 2 == 0 && n + 2 < levels_.size()) cycle(n + 1);  // a pair of levels has a quarter of the points
    for (std::size_t p = 0; p < l.parent.size(); ++p) u_[n][p] += u_[n + 1][std::size_t(l.parent[p])];
    relax(n, true);
  }
};

// What the seeds of a label give each point.
Numbers right_side(const Walk& how, const std::vector<Index>& number, Index points, int label) {
  Numbers b(std::size_t(points), 0);
  const auto edge = [&](Index p, Index q, double weight) {
    if (number[std::size_t(p)] >= 0 && how.seeds[q] == label) b[std::size_t(number[std::size_t(p)])] += weight;
    if (number[std::size_t(q)] >= 0 && how.seeds[p] == label) b[std::size_t(number[std::size_t(q)])] += weight;
  };
  for (Index i = 0; i < how.H; ++i)
    for (Index j = 0; j < how.W; ++j) {
      const Index p = i * how.W + j;
      if (j + 1 < how.W) edge(p, p + 1, how.east[p]);
      if (i + 1 < how.H) edge(p, p + how.W, how.south[p]);
    }
  return b;
}

void run_walk(const Walk& how) {
  const Index pixels = how.H * how.W;
  for (int k = 0; k < how.labels; ++k)
    for (Index p = 0; p < pixels; ++p)
      how.probabilities[k * pixels + p] =
          how.seeds[p] == 0 ? double(k == how.labels - 1) : double(how.seeds[p] == k + 1);
  *how.error = 0;
  std::vector<Index> number(std::size_t(pixels), -1);
  Index points = 0;
  for (Index p = 0; p < pixels; ++p)
    if (how.seeds[p] == 0) number[std::size_t(p)] = points++;
  if (how.labels == 1 || points == 0) return;
  // The last label's is what the others leave.
  const std::vector<Level> levels = levels_of(how, number);
  const Numbers factor = factor_of(levels.back());
  Numbers errors(std::size_t(how.labels - 1));
  at::parallel_for(0, how.labels - 1, 1, [&](Index from, Index to) {
    Label label(levels, factor);
    for (Index k = from; k < to; ++k) {
      const Numbers b = right_side(how, number, points, int(k) + 1);
      errors[std::size_t(k)] = label.solve(b, how.tolerance / (how.labels - 1), how.max_steps);
      for (Index p = 0; p < pixels; ++p)
        if (number[std::size_t(p)] >= 0)
          how.probabilities[k * pixels + p] = label.solution[std::size_t(number[std::size_t(p)])];
    }
  });
  for (int k = 0; k + 1 < how.labels; ++k) {
    for (Index p = 0; p < pixels; ++p)
      if (how.seeds[p] == 0) how.probabilities[(how.labels - 1) * pixels + p] -= how.probabilities[k * pixels + p];
    *how.error += errors[std::size_t(k)];
  }
}

const Kernels kCpu{&run_walk};
const Register kRegistered(at::kCPU, kCpu);

}  // namespace
}  // namespace fastnuggets::walker

// Levenberg-Marquardt on the atoms of one grid, once for a CPU thread and for a CUDA block.
//
// A team is who works on one problem: `rows` groups of `lanes` threads. All its threads run the same code on the same
// numbers and share out the loops; sync() is its barrier.
#pragma once

#include "voxelize/fit.h"
#include "voxelize/voxelize_math.h"

namespace fastnuggets::fit {

constexpr int kUnknowns = 4;  // of an atom: x, y, z, amplitude

constexpr double kLargestMove =
    0.25;  // angstrom; a seed is at most a voxel away from its atom, and may not jump to the next
constexpr double kConverged = 1e-4;  // angstrom, and of the amplitude: the step after it would be far below the noise
constexpr double kFirstDamping = 1e-3;  // the problem is close to quadratic from the start
constexpr double kRidge = 1e-9;         // keeps the matrix definite when an atom reaches no voxel

struct OneThread {
  static constexpr int row = 0, rows = 1, lane = 0, lanes = 1;
  FN_HD void sync() const {}
};

// Derivatives of A k(|v - p|) with respect to p and A; x, y, z is p - v, gauss the gaussian factor of k.
template <class T>
FN_HD void derivatives(T x, T y, T z, T gauss, T amplitude, const Shape<T>& s, T* of) {
  const T q = x * x + y * y + z * z;
  const bool inside = q <= s.reach_squared;
  const RadialSlope<T> k = radial_slope<Density::wave>(q, gauss, s);
  const T slope = inside ? 2 * amplitude * k.q : T(0);
  of[0] = slope * x;
  of[1] = slope * y;
  of[2] = slope * z;
  of[3] = inside ? k.value : T(0);
}

// Solves (N + damping diag N) x = b. N: [n, n], its upper triangle is read; work: [n, n + 1].
template <class Team>
FN_HD void damped_solve(const Team& team, int n, const double* N, const double* b, double damping, double* work,
                        double* x) {
  const std::int64_t stride = n + 1;
  for (int i = team.row; i < n; i += team.rows) {
    double* to = work + i * stride;
    for (int j = i + team.lane; j < n; j += team.lanes) to[j] = N[std::int64_t(i) * n + j];
    if (team.lane == 0) to[i] += damping * to[i] + kRidge;
    if (team.lane == 0) to[n] = b[i];
  }
  // Cholesky, N = U^T U by rows of U; the right-hand side rides along as the last column.
  for (int k = 0; k < n; ++k) {
    team.sync();
    double* pivot_row = work + k * stride;
    const double pivot = pivot_row[k];
    const double scale = 1 / std::sqrt(pivot > kRidge ? pivot : kRidge);
    team.sync();
    if (team.row == 0) {
      for (int j = k + team.lane; j <= n; j += team.lanes) pivot_row[j] *= scale;
    }
    team.sync();
    for (int i = k + 1 + team.row; i < n; i += team.rows) {
      double* to = work + i * stride;
      const double factor = pivot_row[i];
      for (int j = i + team.lane; j <= n; j += team.lanes) to[j] -= factor * pivot_row[j];
    }
  }
  team.sync();
  for (int k = n - 1; k >= 0; --k) {
    const double value = work[k * stride + n] / work[k * stride + k];
    team.sync();
    if (team.row == 0 && team.lane == 0) x[k] = value;
    for (int i = team.row * team.lanes + team.lane; i < k; i += team.rows * team.lanes) {
      work[i * stride + n] -= work[i * stride + k] * value;
    }
    team.sync();
  }
}

// Shortens an atom's move in `step` [4] if it is too long; returns whether it was below kConverged.
FN_HD bool limit(double* step) {
  const double length = std::sqrt(step[0] * step[0] + step[1] * step[1] + step[2] * step[2]);
  if (length > kLargestMove) {
    for (int i = 0; i < 3; ++i) step[i] *= kLargestMove / length;
  }
  return length < kConverged && std::fabs(step[3]) < kConverged;
}

// The solver gives: double residual() of the trial atoms, returning the sum of squares up to a constant;
// void normal_equations() at the atoms of the last residual(); bool propose(damping): trial = kept + step, and whether
// the step was tiny; void keep(): kept = trial. At the start trial = kept. Every thread of a team gets the same
// answers.
template <class Solver>
FN_HD void levenberg_marquardt(Solver& solver, int iterations) {
  double damping = kFirstDamping;
  double energy = solver.residual();
  bool moved = true;
  for (int i = 0; i < iterations; ++i) {
    if (moved) solver.normal_equations();
    if (solver.propose(damping)) {
      // Whether so small a step helped is below the rounding of the energy.
      solver.keep();
      return;
    }
    const double trial = solver.residual();
    moved = trial < energy;
    damping *= moved ? 0.1 : 10;
    if (moved) {
      solver.keep();
      energy = trial;
    }
  }
}

}  // namespace fastnuggets::fit

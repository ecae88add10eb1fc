// CPU kernel of fit_atoms: a unit of work is one grid, so the bits do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/cpu.h"
#include "voxelize/fit_math.h"
#include "voxelize/fit_op.h"

#define FN_LAMBDA __attribute__((always_inline))

namespace fastnuggets::fit {
namespace {

// Lines are worked on in whole groups of so many voxels, aligned in the grid: what two atoms share of a line is whole
// groups too, and no loop has a remainder.
constexpr int kLanes = 8;

constexpr int groups_of(std::int64_t voxels) { return int((voxels + kLanes - 1) / kLanes); }

// An atom set out on the grid.
template <class T>
struct Placed {
  struct Line {
    int first, last;  // groups [first, last) that the atom reaches
  };
  Window window[3];
  int first_group, groups;  // of the window
  std::vector<Line> lines;  // [planes, rows of the window]
  std::vector<T> values;    // [planes, rows, 4 derivatives, groups * kLanes], set where `lines` says

  std::size_t index(int d, int h) const {
    return std::size_t(d - window[0].first) * (window[1].last - window[1].first + 1) + (h - window[1].first);
  }
  const Line& line(int d, int h) const { return lines[index(d, h)]; }
  int stride() const { return groups * kLanes; }
  T* derivatives(int d, int h, int group) {
    return values.data() + index(d, h) * kUnknowns * stride() + (group - first_group) * kLanes;
  }
};

// Stays for the next grid of the same thread.
template <class T>
struct Memory {
  std::vector<Placed<T>> atoms;
  std::vector<T> residual;  // [D, H, groups of W * kLanes], set where atoms reach
  std::vector<T> delta[3], gauss[3];
  std::vector<double> matrix, work, gradient, step, kept, trial;
};

template <class T>
class Solver {
 public:
  FN_HD Solver(const Problems<T>& problems, std::int64_t grid, Memory<T>& memory)
      : p_(problems),
        m_(memory),
        g_(grid),
        n_(int(problems.ptr[grid + 1] - problems.ptr[grid])),
        grid_(problems.grid + grid * problems.voxels()),
        width_(groups_of(problems.shape[2]) * kLanes),
        kernel_(make_shape<Density::wave>(problems.sigma[grid], problems.omega[grid], problems.cutoff)) {
    const std::size_t unknowns = std::size_t(n_) * kUnknowns;
    if (m_.atoms.size() < std::size_t(n_)) m_.atoms.resize(n_);
    m_.residual.resize(p_.shape[0] * p_.shape[1] * width_);
    m_.matrix.resize(unknowns * unknowns);
    m_.work.resize(unknowns * (unknowns + 1));
    for (auto* v : {&m_.gradient, &m_.step, &m_.kept, &m_.trial}) v->resize(unknowns);
    const std::int64_t first = p_.ptr[g_];
    for (int a = 0; a < n_; ++a) {
      for (int i = 0; i < 3; ++i) m_.kept[a * kUnknowns + i] = p_.positions[(first + a) * 3 + i];
      m_.kept[a * kUnknowns + 3] = p_.amplitudes[first + a];
    }
    m_.trial = m_.kept;
  }

  FN_HD void store() const {
    const std::int64_t first = p_.ptr[g_];
    for (int a = 0; a < n_; ++a) {
      for (int i = 0; i < 3; ++i) p_.positions[(first + a) * 3 + i] = T(m_.kept[a * kUnknowns + i]);
      p_.amplitudes[first + a] = T(m_.kept[a * kUnknowns + 3]);
    }
  }

  FN_HD double residual() {
    for (int a = 0; a < n_; ++a) {
      place(a);
      copy_grid(m_.atoms[a]);
    }
    double energy = 0;
    for (int a = 0; a < n_; ++a) energy += subtract(m_.atoms[a], T(m_.trial[a * kUnknowns + 3]));
    return energy;
  }

  FN_HD void normal_equations() {
    for (int a = 0; a < n_; ++a) {
      for (int b = a; b < n_; ++b) products(a, b);
      project(a);
    }
  }

  FN_HD bool propose(double damping) {
    const int unknowns = n_ * kUnknowns;
    damped_solve(OneThread{}, unknowns, m_.matrix.data(), m_.gradient.data(), damping, m_.work.data(), m_.step.data());
    bool converged = true;
    for (int a = 0; a < n_; ++a) converged &= limit(m_.step.data() + a * kUnknowns);
    for (int i = 0; i < unknowns; ++i) m_.trial[i] = m_.kept[i] + m_.step[i];
    return converged;
  }

  FN_HD void keep() { m_.kept.swap(m_.trial); }

 private:
  typedef T Group __attribute__((vector_size(kLanes * sizeof(T))));

  const Problems<T>& p_;
  Memory<T>& m_;
  std::int64_t g_;
  int n_;
  const T* grid_;
  std::int64_t width_;
  Shape<T> kernel_;

  FN_HD T* residual_line(int d, int h, int group) {
    return m_.residual.data() + (std::int64_t(d) * p_.shape[1] + h) * width_ + group * kLanes;
  }

  // Calls f(d, h, line) for the lines of the grid that the atom reaches.
  template <class F>
  FN_HD void for_lines(const Placed<T>& atom, F f) {
    for (int d = atom.window[0].first; d <= atom.window[0].last; ++d)
      for (int h = atom.window[1].first; h <= atom.window[1].last; ++h) {
        const auto line = atom.line(d, h);
        if (line.first < line.last) f(d, h, line);
      }
  }

  // Sets trial atom `a` out: its window, lines and derivatives.
  FN_HD void place(int a) {
    Placed<T>& atom = m_.atoms[a];
    const double* at = m_.trial.data() + a * kUnknowns;
    bool outside = false;
    for (int i = 0; i < 3; ++i) {
      atom.window[i] = window<Density::wave>(at[i], int(p_.shape[i]), p_.spacing[i], kernel_.reach);
      outside = outside || atom.window[i].first > atom.window[i].last;
    }
    if (outside) {
      for (Window& w : atom.window) w = {0, -1};
      return;
    }
    atom.first_group = atom.window[2].first / kLanes;
    atom.groups = atom.window[2].last / kLanes + 1 - atom.first_group;
    fill_table(0, at[0], atom.window[0].first, atom.window[0].last);
    fill_table(1, at[1], atom.window[1].first, atom.window[1].last);
    fill_table(2, at[2], atom.first_group * kLanes, (atom.first_group + atom.groups) * kLanes - 1);
    const std::size_t lines = atom.index(atom.window[0].last, atom.window[1].last) + 1;
    atom.lines.resize(lines);
    atom.values.resize(lines * kUnknowns * atom.stride());
    for (int d = atom.window[0].first; d <= atom.window[0].last; ++d)
      for (int h = atom.window[1].first; h <= atom.window[1].last; ++h) fill_line(atom, d, h, at);
  }

  FN_HD void fill_table(int axis, double at, int first, int last) {
    const int count = last - first + 1;
    m_.delta[axis].resize(count);
    m_.gauss[axis].resize(count);
    T *delta = m_.delta[axis].data(), *gauss = m_.gauss[axis].data();
    for (int k = 0; k < count; ++k) {
      const bool in_grid = first + k < p_.shape[axis];  // the last group of a line may stand out
      delta[k] = T(at - (first + k - 0.5 * (p_.shape[axis] - 1)) * p_.spacing[axis]);
      gauss[k] = in_grid ? exp_(-kernel_.decay * delta[k] * delta[k]) : T(0);
    }
  }

  FN_HD void fill_line(Placed<T>& atom, int d, int h, const double* at) {
    const int x = d - atom.window[0].first, y = h - atom.window[1].first;
    const T dx = m_.delta[0][x], dy = m_.delta[1][y];
    auto& line = atom.lines[atom.index(d, h)];
    const double chord = double(kernel_.reach_squared) - double(dx) * dx - double(dy) * dy;
    line = {0, 0};
    if (chord < 0) return;
    const Window w = window<Density::wave>(at[2], int(p_.shape[2]), p_.spacing[2], T(std::sqrt(chord)));
    if (w.first > w.last) return;
    line = {w.first / kLanes, w.last / kLanes + 1};
    const int stride = atom.stride(), skip = (line.first - atom.first_group) * kLanes;
    const int count = (line.last - line.first) * kLanes;
    const T *dz = m_.delta[2].data() + skip, *ez = m_.gauss[2].data() + skip;
    const T envelope = m_.gauss[0][x] * m_.gauss[1][y], amplitude = T(at[3]);
    const Shape<T> kernel = kernel_;
    T *to_x = atom.derivatives(d, h, line.first), *to_y = to_x + stride, *to_z = to_y + stride, *to_a = to_z + stride;
    // The array is a lambda's own: as one of the loop GCC would keep it in memory, and not vectorise.
    const auto set = [&](std::ptrdiff_t k) FN_LAMBDA {
      T of[kUnknowns];
      derivatives(dx, dy, dz[k], envelope * ez[k], amplitude, kernel, of);
      to_x[k] = of[0];
      to_y[k] = of[1];
      to_z[k] = of[2];
      to_a[k] = of[3];
    };
#pragma omp simd
    for (std::ptrdiff_t k = 0; k < count; ++k) set(k);
  }

  FN_HD void copy_grid(const Placed<T>& atom) {
    for_lines(atom, [&](int d, int h, auto line) FN_LAMBDA {
      const std::int64_t first = line.first * kLanes, last = std::min<std::int64_t>(line.last * kLanes, p_.shape[2]);
      T* to = residual_line(d, h, line.first);
      std::memcpy(to, grid_ + (std::int64_t(d) * p_.shape[1] + h) * p_.shape[2] + first, (last - first) * sizeof(T));
      std::fill(to + (last - first), to + (line.last - line.first) * kLanes, T(0));
    });
  }

  // Returns by how much the sum of squares grows. In double, from the very numbers stored: the terms telescope exactly.
  FN_HD double subtract(Placed<T>& atom, T amplitude) {
    double growth = 0;
    for_lines(atom, [&](int d, int h, auto line) FN_LAMBDA {
      const T* value = atom.derivatives(d, h, line.first) + 3 * atom.stride();
      T* r = residual_line(d, h, line.first);
      const int count = (line.last - line.first) * kLanes;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::ptrdiff_t k = 0; k < count; ++k) {
        const T before = r[k], after = before - amplitude * value[k];
        r[k] = after;
        sum += double(after) * double(after) - double(before) * double(before);
      }
      growth += sum;
    });
    return growth;
  }

  // The 4 x 4 block of the normal matrix that belongs to atoms a and b.
  FN_HD void products(int a, int b) {
    Placed<T>&one = m_.atoms[a], &other = m_.atoms[b];
    Group sums[kUnknowns][kUnknowns] = {};
    const int stride = one.stride(), other_stride = other.stride();
    for (int d = std::max(one.window[0].first, other.window[0].first);
         d <= std::min(one.window[0].last, other.window[0].last); ++d)
      for (int h = std::max(one.window[1].first, other.window[1].first);
           h <= std::min(one.window[1].last, other.window[1].last); ++h) {
        const auto &line = one.line(d, h), &other_line = other.line(d, h);
        const int first = std::max(line.first, other_line.first), last = std::min(line.last, other_line.last);
        if (first >= last) continue;
        const T *u = one.derivatives(d, h, first), *v = other.derivatives(d, h, first);
        for (int k = 0; k < (last - first) * kLanes; k += kLanes) {
          Group of_other[kUnknowns];
#pragma GCC unroll 4
          for (int j = 0; j < kUnknowns; ++j) std::memcpy(&of_other[j], v + j * other_stride + k, sizeof(Group));
#pragma GCC unroll 4
          for (int i = 0; i < kUnknowns; ++i) {
            Group of_one;
            std::memcpy(&of_one, u + i * stride + k, sizeof(Group));
#pragma GCC unroll 4
            for (int j = 0; j < kUnknowns; ++j) sums[i][j] += of_one * of_other[j];
          }
        }
      }
    const std::int64_t unknowns = std::int64_t(n_) * kUnknowns;
    for (int i = 0; i < kUnknowns; ++i)
      for (int j = 0; j < kUnknowns; ++j) {
        double sum = 0;
        for (int k = 0; k < kLanes; ++k) sum += sums[i][j][k];
        m_.matrix[(a * kUnknowns + i) * unknowns + b * kUnknowns + j] = sum;
      }
  }

  // Atom a's part of the gradient: its derivatives times the residual.
  FN_HD void project(int a) {
    Placed<T>& atom = m_.atoms[a];
    Group sums[kUnknowns] = {};
    const int stride = atom.stride();
    for_lines(atom, [&](int d, int h, auto line) FN_LAMBDA {
      const T *u = atom.derivatives(d, h, line.first), *r = residual_line(d, h, line.first);
      for (int k = 0; k < (line.last - line.first) * kLanes; k += kLanes) {
        Group left;
        std::memcpy(&left, r + k, sizeof(Group));
#pragma GCC unroll 4
        for (int i = 0; i < kUnknowns; ++i) {
          Group of_one;
          std::memcpy(&of_one, u + i * stride + k, sizeof(Group));
          sums[i] += of_one * left;
        }
      }
    });
    for (int i = 0; i < kUnknowns; ++i) {
      double sum = 0;
      for (int k = 0; k < kLanes; ++k) sum += sums[i][k];
      m_.gradient[a * kUnknowns + i] = sum;
    }
  }
};

template <class T>
FN_HD void fit_body(const Problems<T>& problems, std::int64_t grid, Memory<T>& memory) {
  Solver<T> solver(problems, grid, memory);
  levenberg_marquardt(solver, problems.iterations);
  solver.store();
}

template <class T>
void fit_generic(const Problems<T>& problems, std::int64_t grid, Memory<T>& memory) {
  fit_body(problems, grid, memory);
}
FN_TARGET_AVX2 void fit_avx2(const Problems<float>& problems, std::int64_t grid, Memory<float>& memory) {
  fit_body(problems, grid, memory);
}
FN_TARGET_AVX512 void fit_avx512(const Problems<float>& problems, std::int64_t grid, Memory<float>& memory) {
  fit_body(problems, grid, memory);
}

template <class T>
auto fit_kernel() {
  if constexpr (std::is_same_v<T, float>) {
    if (simd() == Simd::avx512) return &fit_avx512;
    if (simd() == Simd::avx2) return &fit_avx2;
  }
  return &fit_generic<T>;
}

template <class T>
void fit(const Problems<T>& problems) {
  const auto kernel = fit_kernel<T>();
  at::parallel_for(0, problems.G, 1, [&](std::int64_t first, std::int64_t last) {
    Memory<T> memory;
    for (std::int64_t g = first; g < last; ++g) {
      if (problems.ptr[g] < problems.ptr[g + 1]) kernel(problems, g, memory);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> fit_atoms_cpu(FN_FIT_ATOMS) {
  const FitArgs args(grid, positions, amplitudes, ptr, sigma, omega, spacing, cutoff, iterations);
  if (grid.scalar_type() == at::kDouble)
    fit(args.problems<double>());
  else
    fit(args.problems<float>());
  return {args.positions, args.amplitudes};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnuggets, CPU, m) { m.impl("fit_atoms", fit_atoms_cpu); }

}  // namespace fastnuggets::fit

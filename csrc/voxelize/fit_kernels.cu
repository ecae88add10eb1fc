// A block fits the atoms of one grid from start to end; a warp owns an atom or a pair of atoms, so there are no atomics
// and results do not depend on scheduling. Nothing dense is stored but the normal matrix: derivatives and residuals are
// computed where they are needed.
#include <cstdint>
#include <type_traits>

#include "common/launch.cuh"
#include "voxelize/fit_cuda.h"
#include "voxelize/fit_math.h"

namespace fastnuggets::cuda {
namespace {

using fit::kUnknowns;
using std::int64_t;

constexpr int kWarp = 32;
constexpr int kFitThreads = 256;
constexpr int kFitWarps = kFitThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

struct BlockTeam {
  static constexpr int rows = kFitWarps, lanes = kWarp;
  int row, lane;
  __device__ void sync() const { __syncthreads(); }
};

template <class T>
__device__ T warp_sum(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// An atom set out on the grid.
template <class T>
struct Site {
  T offset[3];  // of the atom from the centre of voxel `first`
  T amplitude;
  Window window[3];  // empty on all axes if the atom reaches no voxel
};

// A grid's part of the workspace.
template <class T>
struct Workspace {
  double *matrix, *work, *gradient, *next_gradient, *step, *kept, *trial, *energy;
  Site<T>* sites;

  static constexpr int64_t kSiteDoubles = sizeof(Site<T>) / sizeof(double);
  static_assert(sizeof(Site<T>) % sizeof(double) == 0 && alignof(Site<T>) <= alignof(double));

  static constexpr int64_t doubles(int64_t atoms) {
    const int64_t n = atoms * kUnknowns;
    return n * n + n * (n + 1) + 5 * n + atoms * (1 + kSiteDoubles);
  }

  __device__ Workspace(double* memory, int64_t atoms) {
    const int64_t n = atoms * kUnknowns;
    matrix = memory;
    work = matrix + n * n;
    gradient = work + n * (n + 1);
    next_gradient = gradient + n;
    step = next_gradient + n;
    kept = step + n;
    trial = kept + n;
    energy = trial + n;
    sites = reinterpret_cast<Site<T>*>(energy + atoms);
  }
};

template <class T>
struct BlockSolver {
  const fit::Problems<T>& p;
  Workspace<T> w;
  const T* grid;
  int n;
  BlockTeam team;
  int& moving;  // shared
  Shape<T> kernel;

  __device__ int thread() const { return team.row * kWarp + team.lane; }

  __device__ double residual() {
    for (int a = thread(); a < n; a += kFitThreads) place(a);
    team.sync();
    for (int a = team.row; a < n; a += kFitWarps) project(a);
    team.sync();
    double energy = 0;
    for (int a = 0; a < n; ++a) energy += w.energy[a];
    return energy;
  }

  __device__ void normal_equations() {
    for (int pair = team.row; pair < n * n; pair += kFitWarps) {
      if (pair / n <= pair % n) products(pair / n, pair % n);
    }
    for (int i = thread(); i < n * kUnknowns; i += kFitThreads) w.gradient[i] = w.next_gradient[i];
    team.sync();
  }

  __device__ bool propose(double damping) {
    fit::damped_solve(team, n * kUnknowns, w.matrix, w.gradient, damping, w.work, w.step);
    if (thread() == 0) moving = 0;
    team.sync();
    for (int a = thread(); a < n; a += kFitThreads) {
      if (!fit::limit(w.step + a * kUnknowns)) moving = 1;
      for (int i = a * kUnknowns; i < (a + 1) * kUnknowns; ++i) w.trial[i] = w.kept[i] + w.step[i];
    }
    team.sync();
    return moving == 0;
  }

  __device__ void keep() {
    double* const kept = w.kept;
    w.kept = w.trial;
    w.trial = kept;
  }

  __device__ void place(int a) {
    Site<T>& site = w.sites[a];
    const double* at = w.trial + a * kUnknowns;
    site.amplitude = T(at[3]);
    bool outside = false;
    for (int i = 0; i < 3; ++i) {
      const int voxels = int(p.shape[i]);
      site.window[i] = window<Density::wave>(at[i], voxels, p.spacing[i], kernel.reach);
      site.offset[i] = T(at[i] - (site.window[i].first - 0.5 * (voxels - 1)) * p.spacing[i]);
      outside = outside || site.window[i].first > site.window[i].last;
    }
    for (int i = 0; outside && i < 3; ++i) site.window[i] = {0, -1};
  }

  struct Offset {
    T x, y, z, square;
  };

  // From voxel (d, h, w) to the atom.
  __device__ Offset offset(const Site<T>& site, int d, int h, int w) const {
    const T x = site.offset[0] - T(d - site.window[0].first) * T(p.spacing[0]);
    const T y = site.offset[1] - T(h - site.window[1].first) * T(p.spacing[1]);
    const T z = site.offset[2] - T(w - site.window[2].first) * T(p.spacing[2]);
    return {x, y, z, x * x + y * y + z * z};
  }

  __device__ bool reaches(const Site<T>& site, const Offset& o) const {
    return site.window[0].first <= site.window[0].last && o.square <= kernel.reach_squared;
  }

  __device__ void derivatives(const Site<T>& site, const Offset& o, T* of) const {
    fit::derivatives(o.x, o.y, o.z, exp_(-kernel.decay * o.square), site.amplitude, kernel, of);
  }

  // Calls f(d, h, w) for the voxels of a box, shared out among the lanes of a warp.
  template <class F>
  __device__ void for_voxels(const Window* box, F f) const {
    const int rows = box[1].last - box[1].first + 1, columns = box[2].last - box[2].first + 1;
    const int count = (box[0].last - box[0].first + 1) * rows * columns;
    for (int i = team.lane; i < count; i += kWarp) {
      f(box[0].first + i / columns / rows, box[1].first + i / columns % rows, box[2].first + i % columns);
    }
  }

  // Atom a's derivatives times the residual, and the energy of the voxels that no atom before it reaches.
  __device__ void project(int a) const {
    const Site<T> site = w.sites[a];
    T sums[kUnknowns] = {};
    double energy = 0;
    for_voxels(site.window, [&](int d, int h, int v) {
      const Offset own = offset(site, d, h, v);
      if (!reaches(site, own)) return;
      const T observed = grid[(int64_t(d) * p.shape[1] + h) * p.shape[2] + v];
      T left = observed;
      bool first = true;
      for (int b = 0; b < n; ++b) {
        const Site<T>& other = w.sites[b];
        const Offset o = offset(other, d, h, v);
        if (!reaches(other, o)) continue;
        left -= other.amplitude * radial_value<Density::wave>(o.square, exp_(-kernel.decay * o.square), kernel);
        first = first && b >= a;
      }
      T of[kUnknowns];
      derivatives(site, own, of);
      for (int i = 0; i < kUnknowns; ++i) sums[i] += of[i] * left;
      if (first) energy += double(left) * double(left) - double(observed) * double(observed);
    });
    energy = warp_sum(energy);
    if (team.lane == 0) w.energy[a] = energy;
    for (int i = 0; i < kUnknowns; ++i) {
      const double sum = warp_sum(double(sums[i]));
      if (team.lane == 0) w.next_gradient[a * kUnknowns + i] = sum;
    }
  }

  // The 4 x 4 block of the normal matrix that belongs to atoms a and b.
  __device__ void products(int a, int b) const {
    const Site<T> one = w.sites[a], other = w.sites[b];
    Window shared[3];
    bool meet = true;
    for (int i = 0; i < 3; ++i) {
      shared[i].first = one.window[i].first > other.window[i].first ? one.window[i].first : other.window[i].first;
      shared[i].last = one.window[i].last < other.window[i].last ? one.window[i].last : other.window[i].last;
      meet = meet && shared[i].first <= shared[i].last;
    }
    T sums[kUnknowns][kUnknowns] = {};
    if (meet) {
      for_voxels(shared, [&](int d, int h, int v) {
        const Offset from_one = offset(one, d, h, v), from_other = offset(other, d, h, v);
        if (!reaches(one, from_one) || !reaches(other, from_other)) return;
        T of_one[kUnknowns], of_other[kUnknowns];
        derivatives(one, from_one, of_one);
        derivatives(other, from_other, of_other);
        for (int i = 0; i < kUnknowns; ++i)
          for (int j = 0; j < kUnknowns; ++j) sums[i][j] += of_one[i] * of_other[j];
      });
    }
    for (int i = 0; i < kUnknowns; ++i)
      for (int j = 0; j < kUnknowns; ++j) {
        const double sum = warp_sum(double(sums[i][j]));
        if (team.lane == 0) w.matrix[int64_t(a * kUnknowns + i) * n * kUnknowns + b * kUnknowns + j] = sum;
      }
  }
};

template <class T>
__global__ void __launch_bounds__(kFitThreads, 1)
    fit_kernel(const __grid_constant__ fit::Problems<T> p, const int64_t* offsets, double* workspace) {
  FN_SHARED(int, moving);
  const int64_t g = blockIdx.x, first = p.ptr[g];
  const int n = int(p.ptr[g + 1] - first);
  if (n == 0) return;
  const BlockTeam team{int(threadIdx.x) / kWarp, int(threadIdx.x) % kWarp};
  BlockSolver<T> solver{p,
                        Workspace<T>(workspace + offsets[g], n),
                        p.grid + g * p.voxels(),
                        n,
                        team,
                        moving,
                        make_shape<Density::wave>(p.sigma[g], p.omega[g], p.cutoff)};
  for (int a = solver.thread(); a < n; a += kFitThreads) {
    for (int i = 0; i < kUnknowns; ++i) {
      const double start = i < 3 ? p.positions[(first + a) * 3 + i] : p.amplitudes[first + a];
      solver.w.kept[a * kUnknowns + i] = solver.w.trial[a * kUnknowns + i] = start;
    }
  }
  fit::levenberg_marquardt(solver, p.iterations);
  for (int a = solver.thread(); a < n; a += kFitThreads) {
    const double* at = solver.w.kept + a * kUnknowns;
    for (int i = 0; i < 3; ++i) p.positions[(first + a) * 3 + i] = T(at[i]);
    p.amplitudes[first + a] = T(at[3]);
  }
}

}  // namespace

template <class T>
int64_t fit_workspace(int64_t atoms) {
  return Workspace<T>::doubles(atoms);
}
template int64_t fit_workspace<float>(int64_t);
template int64_t fit_workspace<double>(int64_t);

template <class T>
void fit_atoms(const fit::Problems<T>& problems, const int64_t* offsets, double* workspace, cudaStream_t stream) {
  FN_LAUNCH(fit_kernel<T>, dim3(unsigned(problems.G)), dim3(kFitThreads), 0, stream, problems, offsets, workspace);
}
template void fit_atoms(const fit::Problems<float>&, const int64_t*, double*, cudaStream_t);
template void fit_atoms(const fit::Problems<double>&, const int64_t*, double*, cudaStream_t);

}  // namespace fastnuggets::cuda

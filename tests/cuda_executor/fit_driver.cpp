// fit_kernels.cu for ctypes: device pointers are pointers, the stream is none.
#include <cstring>
#include <memory>

#include "driver.h"
#include "voxelize/fit_cuda.h"

using namespace fastnuggets;

namespace {

template <class T>
void run(const fit::Problems<T>& problems) {
  const std::unique_ptr<int64_t[]> offsets(new int64_t[problems.G]);
  int64_t total = 0;
  for (int64_t g = 0; g < problems.G; ++g) {
    offsets[g] = total;
    total += cuda::fit_workspace<T>(problems.ptr[g + 1] - problems.ptr[g]);
  }
  const std::unique_ptr<double[]> workspace(new double[total]);
  std::memset(workspace.get(), 0xFF, total * sizeof(double));
  cuda::fit_atoms(problems, offsets.get(), workspace.get(), nullptr);
}

template <class T>
const char* fit_as(const void* grid, const void* sigma, const void* omega, const int64_t* ptr, void* positions,
                   void* amplitudes, int64_t grids, const int64_t* shape, const double* spacing, double cutoff,
                   int64_t iterations) {
  return guarded([&] {
    run<T>({static_cast<const T*>(grid),
            static_cast<const T*>(sigma),
            static_cast<const T*>(omega),
            ptr,
            static_cast<T*>(positions),
            static_cast<T*>(amplitudes),
            grids,
            {shape[0], shape[1], shape[2]},
            {spacing[0], spacing[1], spacing[2]},
            cutoff,
            int(iterations)});
  });
}

}  // namespace

extern "C" {

const char* fit_float(const void* grid, const void* sigma, const void* omega, const int64_t* ptr, void* positions,
                      void* amplitudes, int64_t grids, const int64_t* shape, const double* spacing, double cutoff,
                      int64_t iterations) {
  return fit_as<float>(grid, sigma, omega, ptr, positions, amplitudes, grids, shape, spacing, cutoff, iterations);
}

const char* fit_double(const void* grid, const void* sigma, const void* omega, const int64_t* ptr, void* positions,
                       void* amplitudes, int64_t grids, const int64_t* shape, const double* spacing, double cutoff,
                       int64_t iterations) {
  return fit_as<double>(grid, sigma, omega, ptr, positions, amplitudes, grids, shape, spacing, cutoff, iterations);
}
}

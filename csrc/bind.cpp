#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "common/cpu.h"
#include "voxelize/voxelize_op.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpp"] = __cplusplus;
#ifdef FN_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#ifdef NDEBUG
  info["debug"] = false;
#else
  info["debug"] = true;
#endif
  const char* const levels[] = {"generic", "avx2", "avx512"};
  info["simd"] = levels[static_cast<int>(fastnuggets::simd())];
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("build_info", &build_info);
  m.def("voxelize", &fastnuggets::voxelize, without_gil);
  m.def("voxelize_", &fastnuggets::voxelize_, without_gil);
}

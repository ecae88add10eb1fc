#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "average/average_op.h"
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
  using fastnuggets::average::Plan;
  using Tensors = std::vector<at::Tensor>;
  py::class_<Plan>(m, "AveragePlan")
      .def(py::init<Tensors, Tensors, Tensors, std::int64_t, std::vector<std::int64_t>>(), py::arg("averages"),
           py::arg("remainders"), py::arg("weights"), py::arg("rounding"), py::arg("streams"))
      .def("update", py::overload_cast<const at::Tensor&, std::int64_t, std::int64_t>(&Plan::update), py::arg("rates"),
           py::arg("seed"), py::arg("step"), without_gil)
      .def("update", py::overload_cast<const std::vector<double>&, std::int64_t, std::int64_t>(&Plan::update),
           py::arg("rates"), py::arg("seed"), py::arg("step"), without_gil);
}

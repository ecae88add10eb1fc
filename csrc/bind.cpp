#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "average/average_op.h"
#include "blend/composite_op.h"
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

// Whether the dicts hold these objects in this order: how a plan notices that a model's tensors were replaced, each
// time.
bool same_values(const py::list& dicts, const py::list& values) {
  const Py_ssize_t count = PyList_GET_SIZE(values.ptr());
  Py_ssize_t seen = 0;
  for (Py_ssize_t d = 0; d < PyList_GET_SIZE(dicts.ptr()); ++d) {
    PyObject *const dict = PyList_GET_ITEM(dicts.ptr(), d), *key = nullptr, *value = nullptr;
    if (!PyDict_Check(dict)) throw py::type_error("dicts must be dicts");
    if (PyDict_Size(dict) == 0) continue;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);)
      if (seen == count || PyList_GET_ITEM(values.ptr(), seen++) != value) return false;
  }
  return seen == count;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("build_info", &build_info);
  m.def("same_values", &same_values, py::arg("dicts"), py::arg("values"));
  m.def("voxelize", &fastnuggets::voxelize, without_gil);
  m.def("voxelize_", &fastnuggets::voxelize_, without_gil);
  m.def("composite", &fastnuggets::composite::composite_through_dispatcher, without_gil);
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

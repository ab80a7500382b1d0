// Python's view of the native code. Each part binds its own functions, checks what it is given and works without the
// GIL.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace kpig {
void bind_tree(py::module_& module);
void bind_cpu(py::module_& module);
void bind_cuda(py::module_& module);
}  // namespace kpig

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native code of kpig_fast; kpig_fast.tree.layout and kpig_fast.ops wrap it.";
  kpig::bind_tree(module);
  kpig::bind_cpu(module);
  kpig::bind_cuda(module);
}

// Python's view of the packer: arrays are checked here, the work runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tree/forest.h"

namespace py = pybind11;

namespace {

// The values of a numpy vector, which must outlive the view.
template <typename T>
std::span<const T> view(const py::array& array, const char* name) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) == 0;
  const bool contiguous = (array.flags() & py::array::c_style) != 0;
  if (!py::isinstance<py::array_t<T>>(array) || array.ndim() != 1 || !contiguous || !aligned) {
    const auto wanted = py::str(static_cast<py::object>(py::dtype::of<T>())).cast<std::string>();
    const auto given = py::str(static_cast<py::object>(array.dtype())).cast<std::string>();
    throw py::value_error(std::string(name) + " is a " + std::to_string(array.ndim()) + "-dimensional array of " +
                          given + "; give a contiguous, aligned one-dimensional array of " + wanted);
  }
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

// A numpy vector that owns `values`.
template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
  auto* owned = new std::vector<T>(std::move(values));
  const py::capsule owner(owned, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return py::array_t<T>(std::ssize(*owned), owned->data(), owner);
}

py::list pack_forests(const py::array& tokens, const py::array& offsets, const py::array& response_start,
                      std::int64_t max_tokens) {
  const kpig::tree::Sequences sequences{view<std::int32_t>(tokens, "tokens"), view<std::int64_t>(offsets, "offsets"),
                                        view<std::int64_t>(response_start, "response_start")};
  std::vector<kpig::tree::Forest> forests;
  {
    const py::gil_scoped_release unlocked;
    forests = kpig::tree::pack(sequences, max_tokens);
  }
  py::list result;
  for (auto& forest : forests) {
    result.append(py::make_tuple(to_numpy(std::move(forest.input_ids)), to_numpy(std::move(forest.position_ids)),
                                 to_numpy(std::move(forest.subtree_end)), to_numpy(std::move(forest.sequences)),
                                 to_numpy(std::move(forest.rows)), to_numpy(std::move(forest.row_offsets))));
  }
  return result;
}

}  // namespace

namespace kpig {

void bind_tree(py::module_& module) {
  module.def("pack_forests", &pack_forests, py::arg("tokens"), py::arg("offsets"), py::arg("response_start"),
             py::kw_only(), py::arg("max_tokens"),
             "Token sequences -> list of (input_ids, position_ids, subtree_end, sequences, rows, row_offsets).");
}

}  // namespace kpig

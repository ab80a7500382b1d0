// Python's view of the CUDA kernels. Arguments are addresses and strides of tensors that kpig_fast.ops.rows_cuda has
// checked. A module that was built without CUDA has no kernels here.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/rows.hpp"
#include "cuda/slices.hpp"

namespace py = pybind11;

namespace {

#if KPIG_CUDA

using Address = std::uintptr_t;
// As that of the CPU kernels.
using RowsOf = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t, Address, double, double>;
// Address of the upstream gradient or 0, and the type of the gradient by the rows.
using GradientOf = std::tuple<Address, std::string>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

kpig::cuda::Rows<float> rows(const RowsOf& given) {
  const auto [data, n, columns, stride, bias, scale, softcap] = given;
  return {at<float>(data),
          n,
          columns,
          stride,
          {at<const float>(bias), static_cast<float>(scale), static_cast<float>(softcap)}};
}

kpig::cuda::Type type(const std::string& name) {
  using kpig::cuda::Type;
  if (name == "float32") return Type::kFloat32;
  if (name == "bfloat16") return Type::kBFloat16;
  if (name == "float16") return Type::kFloat16;
  throw std::invalid_argument("no gradient of type " + name);
}

kpig::cuda::Gradient gradient(const GradientOf& given) {
  return {at<const float>(std::get<0>(given)), type(std::get<1>(given))};
}

void logprob_rows(const RowsOf& z, Address target, const GradientOf& by_z, Address out, kpig::cuda::Stream stream) {
  kpig::cuda::logprob_rows(rows(z), at<const std::int64_t>(target), gradient(by_z), at<float>(out), stream);
}

void jsd_rows(const RowsOf& z, const RowsOf& reference, Address temperature, const GradientOf& by_z, Address out,
              kpig::cuda::Stream stream) {
  kpig::cuda::jsd_rows(rows(z), rows(reference), at<const float>(temperature), gradient(by_z), at<float>(out), stream);
}

#endif

}  // namespace

namespace kpig {

void bind_cuda(py::module_& module) {
  module.def(
      "cuda_architectures", [] { return py::list(py::str(KPIG_CUDA_ARCHITECTURES).attr("split")()); },
      "What the CUDA kernels were compiled to, such as sm_90 (GPU code) and compute_90 (PTX); [] without CUDA.");
  module.def("cuda_cluster_size", &cuda::cluster_size,
             "Thread blocks for a row of (columns, sides) where a block may use so many bytes of shared memory; 0: no "
             "room.");
#if KPIG_CUDA
  const py::call_guard<py::gil_scoped_release> unlocked;
  module.def("logprob_rows_cuda", &logprob_rows, unlocked);
  module.def("jsd_rows_cuda", &jsd_rows, unlocked);
  module.def(
      "cuda_versions",
      [] {
        const auto [toolkit, driver] = cuda::versions();
        return std::pair(toolkit, driver);
      },
      "Of the toolkit that built the kernels, and the newest that the driver runs, 13000 for 13.0; 0 without a "
      "driver.");
#endif
}

}  // namespace kpig

// Python's view of the CPU kernels. Arguments are addresses and strides of tensors that kpig_fast.ops.native has
// checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "cpu/attention.hpp"
#include "cpu/isa.hpp"
#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
// Address, stride of a head and stride of a token.
using HeadsOf = std::tuple<Address, std::int64_t, std::int64_t>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
kpig::cpu::Heads<T> heads(const HeadsOf& tensor) {
  return {at<T>(std::get<0>(tensor)), std::get<1>(tensor), std::get<2>(tensor)};
}

// What forward and backward have in common, as Python gives it.
struct Attention {
  HeadsOf q, k, v;
  Address subtree_end, position;
  std::int64_t heads, kv_heads, tokens, d, dv;
  double scale, softcap;
  std::int32_t window;

  template <class T>
  kpig::cpu::TreeAttention<T> of(Address sinks) const {
    return {::heads<const T>(q),
            ::heads<const T>(k),
            ::heads<const T>(v),
            at<const std::int32_t>(subtree_end),
            at<const std::int32_t>(position),
            heads,
            kv_heads,
            tokens,
            d,
            dv,
            static_cast<T>(scale),
            static_cast<T>(softcap),
            window,
            at<const T>(sinks)};
  }
};

template <class T>
void attention(const Attention& tree, Address sinks, const HeadsOf& out, Address lse, int threads) {
  kpig::cpu::tree_attention<T>(tree.of<T>(sinks), {heads<T>(out), at<T>(lse)}, threads);
}

template <class T>
void attention_backward(const Attention& tree, const HeadsOf& grad, const HeadsOf& out, Address lse, Address delta,
                        const HeadsOf& dq, Address dk, Address dv, std::int64_t segments, int threads) {
  const kpig::cpu::AttentionGradients<T> gradients{
      heads<const T>(grad), heads<const T>(out), at<const T>(lse), at<T>(delta),
      heads<T>(dq),         at<T>(dk),           at<T>(dv),        segments};
  kpig::cpu::tree_attention_backward<T>(tree.of<T>(0), gradients, threads);
}

// Address [n, columns], n, columns, stride of a row; address of the bias or 0; scale; soft-cap or 0.
using RowsOf = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t, Address, double, double>;

template <class T>
kpig::cpu::Rows<T> rows(const RowsOf& given) {
  const auto [data, n, columns, stride, bias, scale, softcap] = given;
  return {at<T>(data), n, columns, stride, {at<const T>(bias), static_cast<T>(scale), static_cast<T>(softcap)}};
}

template <class T>
void score_tile(const RowsOf& tile, std::int64_t first_column, Address target, Address top, Address sum, Address picked,
                int threads) {
  const kpig::cpu::Scores<T> scores{at<const std::int64_t>(target), at<T>(top), at<T>(sum), at<T>(picked)};
  kpig::cpu::score_tile<T>(rows<T>(tile), first_column, scores, threads);
}

template <class T>
void logprob_rows(const RowsOf& z, Address target, Address upstream, Address out, int threads) {
  kpig::cpu::logprob_rows<T>(rows<T>(z), at<const std::int64_t>(target), at<const T>(upstream), at<T>(out), threads);
}

template <class T>
void jsd_rows(const RowsOf& z, const RowsOf& reference, Address temperature, Address upstream, Address out,
              int threads) {
  kpig::cpu::jsd_rows<T>(rows<T>(z), rows<T>(reference), at<const T>(temperature), at<const T>(upstream), at<T>(out),
                         threads);
}

}  // namespace

namespace kpig {

void bind_cpu(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::class_<Attention>(module, "Attention")
      .def(py::init([](const HeadsOf& q, const HeadsOf& k, const HeadsOf& v, Address subtree_end, Address position,
                       std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t> sizes,
                       double scale, double softcap, std::int32_t window) {
             const auto [heads, kv_heads, tokens, d, dv] = sizes;
             return Attention{q, k, v, subtree_end, position, heads, kv_heads, tokens, d, dv, scale, softcap, window};
           }),
           "q, k, v, subtree_end, position_ids, (H, Hkv, T, d, dv), scale, softcap or 0, window or 0");
  module.def("tree_attention_float", &attention<float>, unlocked);
  module.def("tree_attention_double", &attention<double>, unlocked);
  module.def("tree_attention_backward_float", &attention_backward<float>, unlocked);
  module.def("tree_attention_backward_double", &attention_backward<double>, unlocked);
  module.def("score_tile_float", &score_tile<float>, unlocked);
  module.def("score_tile_double", &score_tile<double>, unlocked);
  module.def("logprob_rows_float", &logprob_rows<float>, unlocked);
  module.def("logprob_rows_double", &logprob_rows<double>, unlocked);
  module.def("jsd_rows_float", &jsd_rows<float>, unlocked);
  module.def("jsd_rows_double", &jsd_rows<double>, unlocked);
  module.def("supported_isas", &cpu::supported_isas, "Instruction sets that this machine supports, fastest first.");
  module.def("isa_name", &cpu::isa_name, "The instruction set in use.");
  module.def("use_isa", &cpu::use_isa, "Use the named one instead of the fastest or the one that KPIG_CPU_ISA names.");
  module.def("thread_source", &cpu::thread_source, "The OpenMP runtime that kernels run on, or std::thread.");
  module.attr("KEY_CHUNK") = cpu::kKeyChunk;
  module.attr("QUERY_BLOCK") = cpu::kQueryBlock;
  module.attr("HEAD_MULTIPLE") = cpu::kHeadMultiple;
}

}  // namespace kpig

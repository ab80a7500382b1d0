// One cluster for a row: phases (phases.hpp) alternate with reductions over the cluster (cluster.cuh). Before the first
// reduction ends every block has copied its slice of the row, and no gradient is written before that. So the gradient
// may lie over the row, and one in half precision over columns of other blocks.
//
// GPUs before compute capability 9.0 have no clusters: kernels for them only trap and are never launched.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/cluster.cuh"
#include "cuda/rows.hpp"

namespace kpig::cuda {
namespace {

static_assert(sizeof(Found<2, 3>) <= kReductionBytes);

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

extern __shared__ Vector shared_slices[];

// What a thread works on.
struct Place {
  std::int64_t row;
  Slice slice;
  Thread thread;
  // Of the cluster.
  bool is_first;
};

__device__ Place place(std::int64_t columns) {
  const auto cluster = groups::this_cluster();
  const auto blocks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  const Thread thread{static_cast<int>(threadIdx.x), kThreads};
  return {blockIdx.x / blocks, slice_of(columns, blocks, rank), thread, rank == 0 && thread.index == 0};
}

__device__ const float* bias_of(const Rows<float>& rows, const Slice& slice) {
  return rows.transform.bias == nullptr ? nullptr : rows.transform.bias + slice.begin;
}

template <class T>
__device__ void logprob_row(const Rows<float>& rows, const std::int64_t* target, const float* upstream, float* out) {
  __shared__ Found<1, 2> found;
  Vector* z = shared_slices;
  const auto [i, slice, thread, is_first] = place(rows.columns);
  T* gradient = reinterpret_cast<T*>(rows.row(i)) + slice.begin;
  if (target[i] == rowmath::kIgnore) {
    if (is_first) out[i] = 0;
    if (upstream != nullptr) store_zeros(gradient, slice.columns, thread);
    return;
  }
  fetch(z, rows.row(i) + slice.begin, slice.columns, thread);
  fetched();
  const Each<1> own_top{transform_slice(z, slice.columns, thread, rows.transform, bias_of(rows, slice), 1)};
  const auto top = static_cast<float>(over_cluster<Largest>(own_top, found, 0).side[0]);
  const Each<1> own_sum{sum_of_exponentials(z, slice.columns, thread, top)};
  const double sum = over_cluster<Sum>(own_sum, found, 1).side[0];
  auto all_have_read = groups::this_cluster().barrier_arrive();
  if (upstream != nullptr) {
    store_probs(z, slice.columns, thread, rows.transform, top, static_cast<float>(-upstream[i] / sum), gradient);
  }
  const auto column = target[i] - slice.begin;
  if (column >= 0 && column < slice.columns && thread.visits(column)) {
    const float chosen = z[column / kLanes].lane[column % kLanes];
    const double log_p = log_prob(chosen, top, sum);
    out[i] = static_cast<float>(log_p > 0 ? 0 : log_p);
    if (upstream != nullptr) {
      gradient[column] = static_cast<T>(target_gradient(log_p, chosen, rows.transform, upstream[i]));
    }
  }
  // A block's shared memory must outlive its readers.
  groups::this_cluster().barrier_wait(std::move(all_have_read));
}

template <class T>
__device__ void jsd_row(const Rows<float>& rows, const Rows<float>& reference, const float* temperature,
                        const float* upstream, float* out) {
  __shared__ Found<2, 3> found;
  const auto [i, slice, thread, is_first] = place(rows.columns);
  const int columns = slice.columns;
  Vector *z = shared_slices, *r = z + slice_vectors(rows.columns, groups::this_cluster().num_blocks());
  const float t = temperature[i];
  fetch(z, rows.row(i) + slice.begin, columns, thread);
  fetch(r, reference.row(i) + slice.begin, columns, thread);
  fetched();
  const Each<2> own_top{transform_slice(z, columns, thread, rows.transform, bias_of(rows, slice), t),
                        transform_slice(r, columns, thread, reference.transform, bias_of(reference, slice), t)};
  const auto top = over_cluster<Largest>(own_top, found, 0);
  const auto z_top = static_cast<float>(top.side[0]), r_top = static_cast<float>(top.side[1]);
  const Each<2> own_sum{sum_of_exponentials(z, columns, thread, z_top), sum_of_exponentials(r, columns, thread, r_top)};
  const auto sum = over_cluster<Sum>(own_sum, found, 1);
  const auto pair = row_pair(z_top, r_top, sum.side[0], sum.side[1]);
  const auto kl = over_cluster<Sum>(divergences(z, r, columns, thread, pair, rows.transform, t), found, 2);
  auto all_have_read = groups::this_cluster().barrier_arrive();
  if (is_first) out[i] = bits(kl);
  if (upstream != nullptr) {
    const auto factor = static_cast<float>(upstream[i] / (2 * rowmath::kLn2 * t));
    T* gradient = reinterpret_cast<T*>(rows.row(i)) + slice.begin;
    store_divergence_gradient(z, r, columns, thread, static_cast<float>(kl.side[0]), factor, gradient);
  }
  // A block's shared memory must outlive its readers.
  groups::this_cluster().barrier_wait(std::move(all_have_read));
}

#endif

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    logprob_kernel(const __grid_constant__ Rows<float> rows, const std::int64_t* target, const float* upstream,
                   float* out) {
#if __CUDA_ARCH__ >= 900
  logprob_row<T>(rows, target, upstream, out);
#else
  __trap();
#endif
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    jsd_kernel(const __grid_constant__ Rows<float> rows, const __grid_constant__ Rows<float> reference,
               const float* temperature, const float* upstream, float* out) {
#if __CUDA_ARCH__ >= 900
  jsd_row<T>(rows, reference, temperature, upstream, out);
#else
  __trap();
#endif
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  // Else the next to ask CUDA for its last error would be told of this one.
  cudaGetLastError();
  throw std::runtime_error(std::string("the CUDA row passes of kpig_fast failed: ") + cudaGetErrorString(error));
}

// Shared memory beyond 48 KB must be asked for, once for each kernel and device.
void allow(const void* kernel, int device, int shared_memory) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard lock(mutex);
  if (allowed.contains({kernel, device})) return;
  const auto bytes = shared_memory - static_cast<int>(kReductionBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  allowed.emplace(kernel, device);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Rows<float>, Parameters...), int sides, Stream stream, const Rows<float>& rows,
            const Arguments&... arguments) {
  if (rows.n == 0) return;
  int device = 0, shared_memory = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  allow(reinterpret_cast<const void*>(kernel), device, shared_memory);
  const int blocks = cluster_size(rows.columns, sides, shared_memory);
  if (blocks == 0) throw std::invalid_argument("a cluster has no room for rows of so many columns");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows.n * blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(slice_bytes(rows.columns, sides, blocks));
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, rows, arguments...));
}

// function(T{}) for the type of a gradient.
template <class Function>
void with_type(Type type, Function function) {
  switch (type) {
    case Type::kFloat32:
      return function(float{});
    case Type::kBFloat16:
      return function(__nv_bfloat16{});
    case Type::kFloat16:
      return function(__half{});
  }
}

}  // namespace

Versions versions() {
  int driver = 0;
  check(cudaDriverGetVersion(&driver));
  return {CUDART_VERSION, driver};
}

void logprob_rows(const Rows<float>& z, const std::int64_t* target, const Gradient& gradient, float* out,
                  Stream stream) {
  with_type(gradient.type,
            [&](auto zero) { launch(logprob_kernel<decltype(zero)>, 1, stream, z, target, gradient.upstream, out); });
}

void jsd_rows(const Rows<float>& z, const Rows<float>& reference, const float* temperature, const Gradient& gradient,
              float* out, Stream stream) {
  with_type(gradient.type, [&](auto zero) {
    launch(jsd_kernel<decltype(zero)>, 2, stream, z, reference, temperature, gradient.upstream, out);
  });
}

}  // namespace kpig::cuda

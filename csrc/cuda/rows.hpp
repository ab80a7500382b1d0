// Row passes over the vocabulary on a GPU with thread-block clusters: a row, or a pair of rows, is read once into the
// shared memory of a cluster, reduced there, and its gradient is written once. kpig_fast.ops.rows_cuda is their user.
#pragma once

#include <cstdint>

#include "rowmath/logits.hpp"

namespace kpig::cuda {

using rowmath::Rows;

enum class Type { kFloat32, kBFloat16, kFloat16 };

// The gradient by z, over z: row i starts where row i of z starts, also where its numbers are shorter.
struct Gradient {
  const float* upstream;  // [n] or null: none is wanted
  Type type;
};

// A cudaStream_t of the current device.
using Stream = std::uintptr_t;

// Versions of CUDA, 13000 for 13.0: of the toolkit that built the kernels, and the newest that the driver runs, 0
// without a driver.
struct Versions {
  int toolkit, driver;
};
Versions versions();

// Pointers are the GPU's; rows start at multiples of 16 bytes, and cluster_size finds room for them. Launching throws
// std::runtime_error with CUDA's own words.

// out [n] = log p of each target [n], 0 for kIgnore.
void logprob_rows(const Rows<float>& z, const std::int64_t* target, const Gradient& gradient, float* out,
                  Stream stream);

// out [n] = divergence in bits of the softmaxes of both sides' logits / temperature [n].
void jsd_rows(const Rows<float>& z, const Rows<float>& reference, const float* temperature, const Gradient& gradient,
              float* out, Stream stream);

}  // namespace kpig::cuda

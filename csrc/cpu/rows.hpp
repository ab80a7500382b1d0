// Row passes of the operators over the vocabulary: from the raw products z = hidden · weight to log-probs, divergences
// and the gradient by z, in place. kpig_fast.ops.rows_cpu is their user.
#pragma once

#include <cstdint>

#include "rowmath/logits.hpp"

namespace kpig::cpu {

using rowmath::kIgnore;
using rowmath::Rows;
using rowmath::Transform;

// The running log-sum-exp and the target's logit of each row, over tiles of columns.
template <class T>
struct Scores {
  const std::int64_t* target;  // [n]
  T *top, *sum, *picked;       // [n]
};

// Adds a tile of columns that starts at `first_column`; destroys the tile.
template <class T>
void score_tile(const Rows<T>& tile, std::int64_t first_column, const Scores<T>& scores, int threads);

// out [n] = log p of each target, 0 for kIgnore. With upstream [n] the rows become the gradient by z, else are
// destroyed.
template <class T>
void logprob_rows(const Rows<T>& z, const std::int64_t* target, const T* upstream, T* out, int threads);

// out [n] = divergence in bits of the softmaxes of both sides' logits / temperature [n]. Destroys both; with upstream
// [n] the rows of z become the gradient by z.
template <class T>
void jsd_rows(const Rows<T>& z, const Rows<T>& reference, const T* temperature, const T* upstream, T* out, int threads);

}  // namespace kpig::cpu

// Row passes of the operators over the vocabulary: from the raw products z = hidden · weight to log-probs, divergences
// and the gradient by z, in place. kpig_fast.ops.rows_cpu is their user.
//
//     logit = softcap · tanh((z + bias) · scale / softcap)
#pragma once

#include <cstdint>

namespace kpig::cpu {

inline constexpr std::int64_t kIgnore = -100;

// How a head turns raw products into logits.
template <class T>
struct Transform {
  const T* bias;  // [columns] or null
  T scale;
  T softcap;  // 0: none
};

// Rows of raw products; `stride` elements from one row to the next.
template <class T>
struct Rows {
  T* data;
  std::int64_t n, columns, stride;
  Transform<T> transform;

  T* row(std::int64_t i) const { return data + i * stride; }
};

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

// From raw products to logits and back, for a float, double or SIMD vector of either; the same code for CPU and CUDA.
//
//     logit = softcap · tanh((z + bias) · scale / softcap)
#pragma once

#include <cstdint>

#include "rowmath/elementary.hpp"

namespace kpig::rowmath {

// The target of a row that is left out.
inline constexpr std::int64_t kIgnore = -100;
inline constexpr double kLn2 = 0.693147180559945309417;

// Stands for a logit of -inf: its probability is 0, too, but differences of two of them are finite.
template <class T>
inline constexpr T kFar = static_cast<T>(-1e30);

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

  KPIG_ROWMATH T* row(std::int64_t i) const { return data + i * stride; }
};

// For entries that a bias of -inf rules out on both sides; NaN stays NaN.
template <class F>
KPIG_ROWMATH F not_below_far(F x) {
  constexpr auto kLowest = kFar<typename Shape<F>::Element>;
  return x < kLowest ? F{} + kLowest : x;
}

// The logit of z + bias.
template <class F, class T>
KPIG_ROWMATH F to_logit(F z, const Transform<T>& transform) {
  const F x = z * transform.scale;
  return transform.softcap != 0 ? tanh<F>(x / transform.softcap) * transform.softcap : x;
}

// Derivative of a logit by its raw product, from the logit. The cap's slope is 1 without a cap.
template <class F, class T>
KPIG_ROWMATH F slope(const Transform<T>& transform, F logit) {
  if (transform.softcap == 0) return transform.scale - F{};
  const F bent = logit / transform.softcap;
  return (1 - bent * bent) * transform.scale;
}

}  // namespace kpig::rowmath

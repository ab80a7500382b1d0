// SIMD vectors of the instruction set that this file is compiled for, by the compiler's vector types.
//
// Every source that includes this is built once for each instruction set, with KPIG_ISA as its namespace: functions of
// one name must not be merged across instruction sets by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#include "rowmath/elementary.hpp"

namespace kpig::KPIG_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
inline constexpr std::int64_t kLanes = kVectorBytes / sizeof(T);

template <class T>
KPIG_ROWMATH Vec<T> splat(T value) {
  // Unlike adding zero, which would turn -0 into 0, this costs nothing.
  return value - Vec<T>{};
}

template <class T>
KPIG_ROWMATH Vec<T> load(const T* from) {
  Vec<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
KPIG_ROWMATH void store(T* to, Vec<T> x) {
  std::memcpy(to, &x, sizeof x);
}

// The first n lanes; the others are `fill`.
template <class T>
KPIG_ROWMATH Vec<T> load_part(const T* from, std::int64_t n, T fill) {
  Vec<T> x = splat(fill);
  std::memcpy(&x, from, static_cast<std::size_t>(n) * sizeof(T));
  return x;
}

template <class T>
KPIG_ROWMATH void store_part(T* to, Vec<T> x, std::int64_t n) {
  std::memcpy(to, &x, static_cast<std::size_t>(n) * sizeof(T));
}

template <class T>
KPIG_ROWMATH T sum_lanes(Vec<T> x) {
  for (auto half = kLanes<T> / 2; half > 0; half /= 2) {
    for (std::int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

template <class T>
KPIG_ROWMATH T max_lane(Vec<T> x) {
  T top = x[0];
  for (std::int64_t i = 1; i < kLanes<T>; ++i) top = rowmath::maximum(top, static_cast<T>(x[i]));
  return top;
}

}  // namespace kpig::KPIG_ISA

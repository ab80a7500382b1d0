// Elementary functions of float, double, or a SIMD vector of either, the same code for CPU and CUDA.
//
// float: branch-free polynomials, error at most 2 ulp, NaN in gives NaN out. double: the standard library, lane by
// lane.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define KPIG_ROWMATH __host__ __device__ __forceinline__
#else
#define KPIG_ROWMATH [[gnu::always_inline]] inline
#endif

namespace kpig::rowmath {

// The element type of a scalar or vector, and the integers of the same shape.
template <class F>
struct Shape {
  using Element = std::remove_cvref_t<decltype(F{}[0])>;
  using Bits = decltype(F{} < F{});
};
template <>
struct Shape<float> {
  using Element = float;
  using Bits = std::int32_t;
};
template <>
struct Shape<double> {
  using Element = double;
  using Bits = std::int64_t;
};
template <class F>
inline constexpr bool kIsDouble = std::is_same_v<typename Shape<F>::Element, double>;

template <class F>
KPIG_ROWMATH F minimum(F x, F y) {
  return x < y ? x : y;
}

template <class F>
KPIG_ROWMATH F maximum(F x, F y) {
  return x > y ? x : y;
}

template <class F>
KPIG_ROWMATH F absolute(F x) {
  return x < 0 ? -x : x;
}

// x / y; on a GPU, for y in [1, 2^100], with 2 ulp in a fifth of the instructions.
template <class F>
KPIG_ROWMATH F quotient(F x, F y) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<F, float>) return __fdividef(x, y);
#endif
  return x / y;
}

template <class F, class Function>
KPIG_ROWMATH F each_lane(F x, Function function) {
  if constexpr (std::is_floating_point_v<F>) {
    return function(x);
  } else {
    for (unsigned lane = 0; lane < sizeof(F) / sizeof(x[0]); ++lane) x[lane] = function(x[lane]);
    return x;
  }
}

// e^x = power · (1 + rest) with `power` an integer power of two and |rest| < 0.42, for float x in [-88, 88].
// Cody and Waite's reduction by ln 2 in two parts, then a minimax polynomial on |f| <= ln 2 / 2.
template <class F>
struct SplitExp {
  F power, rest;
};

template <class F>
KPIG_ROWMATH SplitExp<F> split_exp(F x) {
  // Adding 1.5 · 2^23 rounds to an integer; 127 more leaves the biased exponent in the low bits of the sum.
  constexpr float kShift = 12582912.0f + 127.0f;
  const F shifted = x * 1.44269504f + kShift;
  const F k = shifted - kShift;
  const F f = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  const F q = (((f * 1.39460512e-3f + 8.36637398e-3f) * f + 4.16662898e-2f) * f + 1.66665453e-1f) * f + 0.5f;
  const auto power = __builtin_bit_cast(typename Shape<F>::Bits, shifted) << 23;
  return {__builtin_bit_cast(F, power), q * f * f + f};
}

// e^x. float: x <= 88; 2 ulp where the result is normal, 0 or a subnormal number below.
template <class F>
KPIG_ROWMATH F exp(F x) {
  if constexpr (kIsDouble<F>) {
    return each_lane(x, [](double lane) { return std::exp(lane); });
  } else {
    // -88 gives the exponent 0, so that every smaller x gives 0.
    const auto [power, rest] = split_exp(x < -88.0f ? F{} - 88.0f : x);
    return power * rest + power;
  }
}

// e^x - 1 without cancellation. float: x <= 88, 2 ulp.
template <class F>
KPIG_ROWMATH F expm1(F x) {
  if constexpr (kIsDouble<F>) {
    return each_lane(x, [](double lane) { return std::expm1(lane); });
  } else {
    const auto [power, rest] = split_exp(x < -88.0f ? F{} - 88.0f : x);
    return power * rest + (power - 1.0f);
  }
}

// log((1 + e^x) / 2) = softplus(x) - ln 2 for x <= 0, without the cancellation near 0. float: 2 ulp, 3 on a GPU, whose
// quotient enters a term of a quarter of the result.
template <class F>
KPIG_ROWMATH F log_mean_exp(F x) {
  const F y = expm1(x);
  if constexpr (kIsDouble<F>) {
    return each_lane(y * 0.5, [](double lane) { return std::log1p(lane); });
  } else {
    // log1p(u) = 2 artanh(s) = u - s (u - 2 s^2 tail) with s = u / (2 + u), |s| <= 1/3, a minimax polynomial in s^2.
    const F u = y * 0.5f, s = quotient<F>(u, u + 2.0f), t = s * s;
    const F tail = ((t * 2.79541372e-1f + 2.80153446e-1f) * t + 4.00205376e-1f) * t + 6.66664382e-1f;
    return u - s * (u - t * tail);
  }
}

// Hyperbolic tangent. float: 3 ulp.
template <class F>
KPIG_ROWMATH F tanh(F x) {
  const F y = expm1(absolute(x) * -2);
  const F size = -y / (y + 2);
  return x < 0 ? -size : size;
}

}  // namespace kpig::rowmath

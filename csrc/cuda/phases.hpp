// What a thread does with its columns of a slice between two reductions over the row; a host can run it, too.
//
// Slices lie in shared memory as vectors of kLanes columns, the last one filled up. A thread visits the same vectors in
// every phase, so that it needs nobody else's.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/slices.hpp"
#include "rowmath/divergence.hpp"
#include "rowmath/logits.hpp"

#ifdef __CUDACC__
#include <cuda_pipeline.h>
#endif

namespace kpig::cuda {

using rowmath::Transform;

inline constexpr float kNone = -std::numeric_limits<float>::infinity();

// One value of a row for each side.
template <int kSides>
struct Each {
  double side[kSides];
};

template <class T>
struct alignas(kLanes * sizeof(T)) Packed {
  T lane[kLanes];
};
using Vector = Packed<float>;

// Both choose once for a whole vector: a branch costs as much as a product.
KPIG_ROWMATH Vector to_logits(Vector x, const Transform<float>& transform) {
  if (transform.softcap == 0) {
    for (float& z : x.lane) z *= transform.scale;
  } else {
    for (float& z : x.lane) z = rowmath::to_logit(z, transform);
  }
  return x;
}

// y times the slope of logits.
KPIG_ROWMATH Vector times_slope(Vector y, const Vector& logits, const Transform<float>& transform) {
  if (transform.softcap == 0) {
    for (float& each : y.lane) each *= transform.scale;
  } else {
    for (int lane = 0; lane < kLanes; ++lane) y.lane[lane] *= rowmath::slope(transform, logits.lane[lane]);
  }
  return y;
}

// One of a block's threads.
struct Thread {
  int index, count;

  // Whether it visits a column of the slice.
  KPIG_ROWMATH bool visits(std::int64_t column) const { return column / kLanes % count == index; }
};

// each(v, lanes) for every vector of the thread; `lanes` of its columns exist.
template <class Function>
KPIG_ROWMATH void each_vector(int columns, Thread thread, Function each) {
  for (int v = thread.index; v * kLanes < columns; v += thread.count) {
    each(v, rowmath::minimum(kLanes, columns - v * kLanes));
  }
}

// Start to copy; fetched() waits for all copies of the thread.
template <class T>
KPIG_ROWMATH void copy(const T* from, T* to) {
#ifdef __CUDA_ARCH__
  __pipeline_memcpy_async(to, from, sizeof(T));
#else
  *to = *from;
#endif
}

// Start to copy a slice of a row.
KPIG_ROWMATH void fetch(Vector* slice, const float* from, int columns, Thread thread) {
  each_vector(columns, thread, [&](int v, int lanes) {
    if (lanes == kLanes) {
      copy(reinterpret_cast<const Vector*>(from) + v, slice + v);
    } else {
      for (int lane = 0; lane < lanes; ++lane) copy(from + v * kLanes + lane, slice[v].lane + lane);
    }
  });
}

KPIG_ROWMATH void fetched() {
#ifdef __CUDA_ARCH__
  __pipeline_commit();
  __pipeline_wait_prior(0);
#endif
}

// Raw products become logits / temperature, and -inf behind the last column; their maximum. `bias` is that of the
// slice.
KPIG_ROWMATH float transform_slice(Vector* slice, int columns, Thread thread, const Transform<float>& transform,
                                   const float* bias, float temperature) {
  // Its rounding is that of the temperature, the same for every entry of both sides.
  const float inverse = 1 / temperature;
  float top = kNone;
  each_vector(columns, thread, [&](int v, int lanes) {
    Vector x = slice[v];
    if (bias != nullptr) {
      for (int lane = 0; lane < kLanes; ++lane) x.lane[lane] += lane < lanes ? bias[v * kLanes + lane] : 0;
    }
    x = to_logits(x, transform);
    for (int lane = 0; lane < kLanes; ++lane) {
      x.lane[lane] = lane < lanes ? x.lane[lane] * inverse : kNone;
      top = rowmath::maximum(top, x.lane[lane]);
    }
    slice[v] = x;
  });
  return top;
}

// Lanes are summed up apart: rounding grows with the number of terms.
KPIG_ROWMATH double sum_lanes(const Vector& x) {
  return (static_cast<double>(x.lane[0]) + x.lane[1]) + (static_cast<double>(x.lane[2]) + x.lane[3]);
}

// Sum of e^(z - top).
KPIG_ROWMATH double sum_of_exponentials(const Vector* slice, int columns, Thread thread, float top) {
  Vector sum = {};
  each_vector(columns, thread, [&](int v, int) {
    const Vector x = slice[v];
    for (int lane = 0; lane < kLanes; ++lane) sum.lane[lane] += rowmath::exp(x.lane[lane] - top);
  });
  return sum_lanes(sum);
}

template <class T>
KPIG_ROWMATH void store(T* to, const Vector& x, int lanes) {
  Packed<T> rounded;
  for (int lane = 0; lane < kLanes; ++lane) rounded.lane[lane] = static_cast<T>(x.lane[lane]);
  if (lanes == kLanes) {
    *reinterpret_cast<Packed<T>*>(to) = rounded;
  } else {
    for (int lane = 0; lane < lanes; ++lane) to[lane] = rounded.lane[lane];
  }
}

// A target's log-probability, before it is kept from rising above 0.
KPIG_ROWMATH double log_prob(float chosen, float top, double sum) {
  return (static_cast<double>(chosen) - top) - std::log(sum);
}

template <class T>
KPIG_ROWMATH void store_zeros(T* gradient, int columns, Thread thread) {
  each_vector(columns, thread, [&](int v, int lanes) { store(gradient + v * kLanes, Vector{}, lanes); });
}

// The gradient of a log-prob by the raw products, but for the target's entry; `share` is -upstream / sum.
template <class T>
KPIG_ROWMATH void store_probs(const Vector* slice, int columns, Thread thread, const Transform<float>& transform,
                              float top, float share, T* gradient) {
  each_vector(columns, thread, [&](int v, int lanes) {
    const Vector x = slice[v];
    Vector p;
    for (int lane = 0; lane < kLanes; ++lane) p.lane[lane] = rowmath::exp(x.lane[lane] - top) * share;
    store(gradient + v * kLanes, times_slope(p, x, transform), lanes);
  });
}

// The target's entry: 1 - p from log p keeps its relative accuracy where p is near 1.
KPIG_ROWMATH float target_gradient(double log_p, float chosen, const Transform<float>& transform, float upstream) {
  return static_cast<float>(std::expm1(log_p)) * -upstream * rowmath::slope(transform, chosen);
}

// What every term of a divergence needs of its two rows.
struct RowPair {
  float z_top, r_top, z_share, r_share;
  // Of the log-sum-exps, in two parts: a rounding of it would move every entry the same way.
  float shift, shift_rest;
};

KPIG_ROWMATH RowPair row_pair(float z_top, float r_top, double z_sum, double r_sum) {
  const double shift = (static_cast<double>(r_top) - z_top) + std::log(r_sum / z_sum);
  const auto part = static_cast<float>(shift);
  return {z_top,
          r_top,
          static_cast<float>(1 / z_sum),
          static_cast<float>(1 / r_sum),
          part,
          static_cast<float>(shift - part)};
}

// Sums of p log(p/m) and q log(q/m). z becomes log(p/m), and r p times the slope of the logits.
KPIG_ROWMATH Each<2> divergences(Vector* z, Vector* r, int columns, Thread thread, const RowPair& pair,
                                 const Transform<float>& transform, float temperature) {
  Vector kl_p = {}, kl_q = {};
  each_vector(columns, thread, [&](int v, int) {
    const Vector x = z[v], y = r[v];
    Vector log_pm, probs, logits;
    for (int lane = 0; lane < kLanes; ++lane) {
      const float a = rowmath::not_below_far(x.lane[lane]), b = rowmath::not_below_far(y.lane[lane]);
      const float p = rowmath::exp(a - pair.z_top) * pair.z_share, q = rowmath::exp(b - pair.r_top) * pair.r_share;
      // The difference of two close logits is exact, that of two log-probs is not.
      const auto log_ratio = rowmath::log_ratios(((b - a) - pair.shift) - pair.shift_rest);
      kl_p.lane[lane] += p * log_ratio.p;
      kl_q.lane[lane] += q * log_ratio.q;
      log_pm.lane[lane] = log_ratio.p;
      probs.lane[lane] = p;
      logits.lane[lane] = a * temperature;
    }
    z[v] = log_pm;
    r[v] = times_slope(probs, logits, transform);
  });
  return {{sum_lanes(kl_p), sum_lanes(kl_q)}};
}

KPIG_ROWMATH float bits(const Each<2>& kl) {
  const double sum = (kl.side[0] + kl.side[1]) / (2 * rowmath::kLn2);
  return static_cast<float>(sum < 0 ? 0 : sum);
}

// The gradient of a divergence by the raw products, from what divergences() has left in z and r.
template <class T>
KPIG_ROWMATH void store_divergence_gradient(const Vector* z, const Vector* r, int columns, Thread thread, float kl_p,
                                            float factor, T* gradient) {
  each_vector(columns, thread, [&](int v, int lanes) {
    Vector x = z[v];
    const Vector p = r[v];
    for (int lane = 0; lane < kLanes; ++lane) x.lane[lane] = (x.lane[lane] - kl_p) * factor * p.lane[lane];
    store(gradient + v * kLanes, x, lanes);
  });
}

}  // namespace kpig::cuda

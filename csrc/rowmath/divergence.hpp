// The terms of the Jensen-Shannon divergence at one vocabulary entry, the same code for CPU and CUDA.
#pragma once

#include "rowmath/elementary.hpp"

namespace kpig::rowmath {

// log(p/m) and log(q/m) with m = (p + q) / 2.
template <class F>
struct LogRatios {
  F p, q;
};

// From log(q/p): finite for every finite argument, also where p and q underflow, and without the cancellation that
// ln 2 - softplus has near 0.
template <class F>
KPIG_ROWMATH LogRatios<F> log_ratios(F log_qp) {
  const F common = -log_mean_exp<F>(-absolute(log_qp));
  return {common - maximum<F>(log_qp, F{}), common + minimum<F>(log_qp, F{})};
}

}  // namespace kpig::rowmath

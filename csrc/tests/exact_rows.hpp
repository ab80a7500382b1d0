// The row passes over the vocabulary in more digits, by plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "rowmath/logits.hpp"

namespace kpig::tests {

using Exact = long double;

// Exact results of one row, and the size of the terms that they are sums of.
struct Truth {
  Exact out = 0, out_size = 0;
  std::vector<Exact> gradient, gradient_size;
};

struct Logits {
  std::vector<Exact> log_p, slope;

  Logits(const rowmath::Rows<float>& rows, std::int64_t i, Exact temperature) {
    const auto& [bias, scale, cap] = rows.transform;
    Exact top = -std::numeric_limits<Exact>::infinity(), sum = 0;
    for (std::int64_t v = 0; v < rows.columns; ++v) {
      const Exact x = (rows.row(i)[v] + (bias == nullptr ? Exact{0} : bias[v])) * scale;
      const Exact bent = cap == 0 ? 0 : std::tanh(x / cap);
      log_p.push_back((cap == 0 ? x : bent * cap) / temperature);
      slope.push_back((1 - bent * bent) * scale);
      top = std::max(top, log_p.back());
    }
    for (const auto x : log_p) sum += std::exp(x - top);
    for (auto& x : log_p) x -= top + std::log(sum);
  }
};

inline Truth true_logprob(const rowmath::Rows<float>& rows, std::int64_t i, std::int64_t target, Exact upstream) {
  const auto columns = static_cast<std::size_t>(rows.columns), chosen = static_cast<std::size_t>(target);
  Truth truth{0, 0, std::vector<Exact>(columns), std::vector<Exact>(columns)};
  if (target == rowmath::kIgnore) return truth;
  const Logits logits(rows, i, 1);
  truth.out = logits.log_p[chosen];
  truth.out_size = std::max(Exact{1}, -truth.out);
  for (std::size_t v = 0; v < columns; ++v) {
    const Exact by_logit = v == chosen ? -std::expm1(logits.log_p[v]) : -std::exp(logits.log_p[v]);
    truth.gradient[v] = by_logit * upstream * logits.slope[v];
    truth.gradient_size[v] = std::abs(truth.gradient[v]);
  }
  return truth;
}

inline Truth true_jsd(const rowmath::Rows<float>& rows, const rowmath::Rows<float>& reference, std::int64_t i, Exact t,
                      Exact upstream) {
  const Logits a(rows, i, t), b(reference, i, t);
  const Exact scale = 1 / (2 * std::log(Exact{2}));
  std::vector<Exact> log_pm;
  Truth truth;
  Exact kl_p = 0;
  for (std::size_t v = 0; v < a.log_p.size(); ++v) {
    const Exact p = std::exp(a.log_p[v]), q = std::exp(b.log_p[v]), d = std::abs(a.log_p[v] - b.log_p[v]);
    const bool none = p == 0 && q == 0;
    // -log((1 + e^-d) / 2), from which the larger of both logarithms differs by nothing.
    const Exact larger = none ? 0 : -std::log1p(std::expm1(-d) / 2);
    log_pm.push_back(none ? 0 : larger - (a.log_p[v] < b.log_p[v] ? d : 0));
    const Exact from_p = p == 0 ? 0 : p * log_pm[v];
    const Exact from_q = q == 0 ? 0 : q * (larger - (b.log_p[v] < a.log_p[v] ? d : 0));
    kl_p += from_p;
    truth.out += (from_p + from_q) * scale;
    truth.out_size += (std::abs(from_p) + std::abs(from_q)) * scale;
  }
  for (std::size_t v = 0; v < a.log_p.size(); ++v) {
    const Exact factor = std::exp(a.log_p[v]) * upstream * scale / t * a.slope[v];
    truth.gradient.push_back(factor == 0 ? 0 : factor * (log_pm[v] - kl_p));
    truth.gradient_size.push_back(factor == 0 ? 0 : std::abs(factor) * (std::abs(log_pm[v]) + std::abs(kl_p)));
  }
  return truth;
}

}  // namespace kpig::tests

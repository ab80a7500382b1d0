// Row passes over the vocabulary against plain loops in more digits, on every instruction set of this machine.
#include "cpu/rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "cpu/isa.hpp"
#include "tests/numbers.hpp"

namespace {

using kpig::cpu::Rows;
using kpig::tests::expect;
using kpig::tests::expect_close;
using kpig::tests::normal;
using std::size_t;
using Exact = long double;

constexpr std::int64_t kGap = 5;
constexpr double kRoundings = 64;

// Rows that lie kGap elements apart, the last one without a gap behind it.
template <class T>
struct Case {
  std::int64_t n, columns, stride = columns + kGap;
  std::vector<T> bias = normal<T>(columns, 8), z, before;
  bool bent;

  Case(std::int64_t n, std::int64_t columns, bool bent, unsigned seed, double deviation)
      : n(n), columns(columns), z(normal<T>((n - 1) * stride + columns, seed, deviation)), before(z), bent(bent) {}

  Rows<T> rows() {
    const auto* given = bent ? bias.data() : nullptr;
    return {z.data(), n, columns, stride, {given, bent ? T(1.7) : T(1), bent ? T(2.5) : T(0)}};
  }
  T at(std::int64_t i, std::int64_t v) const { return z[static_cast<size_t>(i * stride + v)]; }

  Exact logit(std::int64_t i, std::int64_t v) const {
    const Exact raw = before[static_cast<size_t>(i * stride + v)];
    return bent ? T(2.5) * std::tanh((raw + bias[static_cast<size_t>(v)]) * T(1.7) / T(2.5)) : raw;
  }
  Exact slope(Exact logit) const { return bent ? (1 - logit * logit / (T(2.5) * T(2.5))) * T(1.7) : 1; }

  std::vector<Exact> log_probs(std::int64_t i, Exact temperature) const {
    std::vector<Exact> logs(static_cast<size_t>(columns));
    Exact top = -std::numeric_limits<Exact>::infinity(), sum = 0;
    for (std::int64_t v = 0; v < columns; ++v) {
      logs[static_cast<size_t>(v)] = logit(i, v) / temperature;
      top = std::max(top, logs[static_cast<size_t>(v)]);
    }
    for (const auto x : logs) sum += std::exp(x - top);
    for (auto& x : logs) x -= top + std::log(sum);
    return logs;
  }

  void expect_gaps_untouched() const {
    for (std::int64_t i = 0; i + 1 < n; ++i) {
      for (auto at = i * stride + columns; at < (i + 1) * stride; ++at) {
        const auto index = static_cast<size_t>(at);
        expect(z[index] == before[index], "between rows", z[index], before[index]);
      }
    }
  }
};

std::vector<std::int64_t> targets(std::int64_t n, std::int64_t columns) {
  std::vector<std::int64_t> target(static_cast<size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) {
    target[static_cast<size_t>(i)] = i % 3 == 1 ? kpig::cpu::kIgnore : (columns - 1 - 5 * i % columns);
  }
  return target;
}

template <class T>
void test_logprob(std::int64_t n, std::int64_t columns, bool bent, double size, int threads) {
  Case<T> c(n, columns, bent, 3, size);
  const auto target = targets(n, columns);
  const auto upstream = normal<T>(n, 4);
  std::vector<T> out(static_cast<size_t>(n));
  kpig::cpu::logprob_rows<T>(c.rows(), target.data(), upstream.data(), out.data(), threads);
  for (std::int64_t i = 0; i < n; ++i) {
    const auto row = static_cast<size_t>(i);
    const auto logs = c.log_probs(i, 1);
    const bool counts = target[row] != kpig::cpu::kIgnore;
    expect_close(out[row], counts ? logs[static_cast<size_t>(target[row])] : 0, kRoundings, "log-prob");
    for (std::int64_t v = 0; v < columns; ++v) {
      const Exact p = std::exp(logs[static_cast<size_t>(v)]);
      const Exact exact = ((v == target[row]) - p) * upstream[row] * c.slope(c.logit(i, v));
      expect_close(c.at(i, v), counts ? exact : 0, kRoundings * size, "gradient of a log-prob");
    }
  }
  c.expect_gaps_untouched();
  Case<T> quiet(n, columns, bent, 3, size);
  std::vector<T> again(static_cast<size_t>(n));
  kpig::cpu::logprob_rows<T>(quiet.rows(), target.data(), nullptr, again.data(), threads);
  expect(again == out, "log-probs without a gradient", again[0], out[0]);
}

template <class T>
void test_score(std::int64_t n, std::int64_t columns, bool bent, int threads) {
  Case<T> c(n, columns, bent, 5, 3);
  const auto target = targets(n, columns);
  const auto rows = static_cast<size_t>(n);
  std::vector<T> top(rows, -std::numeric_limits<T>::infinity()), sum(rows), picked(rows);
  // Tiles as a driver passes them: parts of the same rows.
  for (std::int64_t first = 0; first < columns; first += 40) {
    auto tile = c.rows();
    tile.data += first;
    tile.columns = std::min<std::int64_t>(40, columns - first);
    if (bent) tile.transform.bias += first;
    kpig::cpu::score_tile<T>(tile, first, {target.data(), top.data(), sum.data(), picked.data()}, threads);
  }
  for (size_t i = 0; i < rows; ++i) {
    if (target[i] == kpig::cpu::kIgnore) continue;
    const T found = (picked[i] - top[i]) - std::log(sum[i]);
    const auto logs = c.log_probs(static_cast<std::int64_t>(i), 1);
    expect_close(found, logs[static_cast<size_t>(target[i])], kRoundings, "log-prob by tiles");
  }
  c.expect_gaps_untouched();
}

template <class T>
void test_jsd(std::int64_t n, std::int64_t columns, bool bent, double size, int threads) {
  Case<T> c(n, columns, bent, 6, size), reference(n, columns, false, 7, size);
  const auto upstream = normal<T>(n, 4);
  std::vector<T> temperature(static_cast<size_t>(n)), out(static_cast<size_t>(n));
  for (size_t i = 0; i < temperature.size(); ++i) temperature[i] = T(0.5) + T(0.25) * static_cast<T>(i);
  kpig::cpu::jsd_rows<T>(c.rows(), reference.rows(), temperature.data(), upstream.data(), out.data(), threads);
  const Exact ln2 = std::log(Exact{2});
  for (std::int64_t i = 0; i < n; ++i) {
    const auto row = static_cast<size_t>(i);
    const auto a = c.log_probs(i, temperature[row]), b = reference.log_probs(i, temperature[row]);
    std::vector<Exact> log_pm(a.size());
    Exact kl_p = 0, kl_q = 0;
    for (size_t v = 0; v < a.size(); ++v) {
      const Exact both = std::max(a[v], b[v]) + std::log1p(std::exp(-std::abs(a[v] - b[v]))) - ln2;
      log_pm[v] = a[v] - both;
      kl_p += std::exp(a[v]) * log_pm[v];
      kl_q += std::exp(b[v]) * (b[v] - both);
    }
    expect_close(out[row], (kl_p + kl_q) / (2 * ln2), kRoundings * size, "divergence");
    for (std::int64_t v = 0; v < columns; ++v) {
      const auto column = static_cast<size_t>(v);
      const Exact by_logit =
          std::exp(a[column]) * (log_pm[column] - kl_p) * upstream[row] / (2 * ln2 * temperature[row]);
      expect_close(c.at(i, v), by_logit * c.slope(c.logit(i, v)), kRoundings * size, "gradient of a divergence");
    }
  }
  c.expect_gaps_untouched();
  reference.expect_gaps_untouched();
  Case<T> quiet(n, columns, bent, 6, size), quiet_reference(n, columns, false, 7, size);
  std::vector<T> again(static_cast<size_t>(n));
  kpig::cpu::jsd_rows<T>(quiet.rows(), quiet_reference.rows(), temperature.data(), nullptr, again.data(), threads);
  expect(again == out, "divergences without a gradient", again[0], out[0]);
}

template <class T>
void test_all() {
  for (const std::int64_t columns : {1, 7, 97, 1003}) {
    for (const std::int64_t n : {1, 4, 40}) {
      for (const bool bent : {false, true}) {
        const int threads = n == 40 ? 3 : 1;
        test_logprob<T>(n, columns, bent, 3, threads);
        test_score<T>(n, columns, bent, threads);
        test_jsd<T>(n, columns, bent, 3, threads);
      }
    }
  }
  // Nearly every probability underflows, on both sides.
  test_logprob<T>(4, 97, false, 1e4, 1);
  test_jsd<T>(4, 97, false, 1e4, 1);
}

}  // namespace

int main() {
  for (const auto& isa : kpig::cpu::supported_isas()) {
    kpig::cpu::use_isa(isa);
    test_all<float>();
    test_all<double>();
    std::printf("%s: %d failed so far\n", isa.c_str(), kpig::tests::failures);
  }
  return kpig::tests::exit_code();
}

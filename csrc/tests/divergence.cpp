// The stated properties of csrc/rowmath/divergence.hpp, in the instruction set that this program is compiled for.
#include "rowmath/divergence.hpp"

#include <cmath>
#include <cstdio>
#include <limits>

#include "cpu/isa.hpp"
#include "cpu/vec.hpp"
#include "tests/check.hpp"

namespace {

using kpig::KPIG_ISA::splat;
using kpig::KPIG_ISA::Vec;
using kpig::rowmath::log_ratios;
using kpig::tests::expect;

// log(p/m) from log(q/p): -log((1 + q/p) / 2), and -log(q/p) + ln 2 where q/p overflows.
double true_log_pm(double log_qp) {
  if (log_qp > 700) return std::log(2.0) - log_qp;
  return -std::log1p(std::expm1(log_qp) / 2);
}

template <class T>
void expect_ulps(T found, double exact, const char* what) {
  // The common part errs by 2, its difference from log(q/p) by one more, of at most twice the result.
  const double allowed = 6 * static_cast<double>(std::numeric_limits<T>::epsilon()) * std::abs(exact);
  const double tiny = static_cast<double>(std::numeric_limits<T>::min());
  expect(std::abs(static_cast<double>(found) - exact) <= allowed + tiny, what, static_cast<double>(found), exact);
}

template <class T>
void test_value(T log_qp) {
  const auto ratios = log_ratios<Vec<T>>(splat(log_qp));
  const auto alone = log_ratios<T>(log_qp);
  const auto mirrored = log_ratios<Vec<T>>(splat(-log_qp));
  const auto exact = static_cast<double>(log_qp);
  for (unsigned lane = 0; lane < sizeof ratios.p / sizeof(T); ++lane) {
    expect(std::isfinite(ratios.p[lane]) && std::isfinite(ratios.q[lane]), "finite", ratios.p[lane], ratios.q[lane]);
    expect_ulps<T>(ratios.p[lane], true_log_pm(exact), "log(p/m)");
    expect_ulps<T>(ratios.q[lane], true_log_pm(-exact), "log(q/m)");
    expect(ratios.p[lane] == mirrored.q[lane], "exchanging p and q", ratios.p[lane], mirrored.q[lane]);
  }
  expect_ulps<T>(alone.p, true_log_pm(exact), "log(p/m) of a scalar");
  expect_ulps<T>(alone.q, true_log_pm(-exact), "log(q/m) of a scalar");
}

template <class T>
void test_all() {
  for (int exponent = -60; exponent <= 100; ++exponent) {
    for (const double mantissa : {1.0, 1.37, 1.93}) {
      test_value(static_cast<T>(std::ldexp(mantissa, exponent)));
      test_value(static_cast<T>(-std::ldexp(mantissa, exponent)));
    }
  }
  test_value(std::numeric_limits<T>::max());
  test_value(-std::numeric_limits<T>::max());
  const auto zero = log_ratios<Vec<T>>(Vec<T>{});
  expect(zero.p[0] == 0 && zero.q[0] == 0, "equal probabilities", zero.p[0], 0);
  const auto nan = log_ratios<Vec<T>>(splat(std::numeric_limits<T>::quiet_NaN()));
  expect(std::isnan(nan.p[0]) && std::isnan(nan.q[0]), "NaN stays NaN", nan.p[0], nan.q[0]);
}

}  // namespace

int main() {
  if (!kpig::cpu::supports(kpig::cpu::Isa::KPIG_ISA)) {
    std::puts("this machine lacks the instruction set: nothing tested");
    return 0;
  }
  test_all<float>();
  test_all<double>();
  return kpig::tests::exit_code();
}

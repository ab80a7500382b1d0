// The stated errors of csrc/rowmath/elementary.hpp, in the instruction set that this program is compiled for.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/isa.hpp"
#include "cpu/vec.hpp"
#include "tests/check.hpp"

namespace {

using kpig::KPIG_ISA::load;
using kpig::KPIG_ISA::Vec;
using kpig::tests::expect;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Distance in units of the last place of `exact`, of at least the smallest normal number.
double ulps(float found, double exact) {
  if (std::isnan(exact) || std::isinf(exact))
    return std::bit_cast<std::uint32_t>(found) != std::bit_cast<std::uint32_t>(static_cast<float>(exact));
  const int exponent = std::max(std::ilogb(exact), -126);
  return std::abs(found - exact) / std::ldexp(1.0, exponent - 23);
}

template <class Function>
float vector_value(Function function, float x) {
  return function(kpig::KPIG_ISA::splat(x))[0];
}

// The largest error over every `stride`-th float between `from` and `to`, of one sign.
template <class Function, class Exact>
double worst(Function function, Exact exact, float from, float to, std::uint32_t stride) {
  constexpr auto kLanes = kpig::KPIG_ISA::kLanes<float>;
  const auto first = std::bit_cast<std::uint32_t>(from), last = std::bit_cast<std::uint32_t>(to);
  double largest = 0;
  for (auto bits = first; bits <= last;) {
    float x[kLanes];
    for (auto& value : x) {
      value = std::bit_cast<float>(std::min(bits, last));
      bits += stride;
    }
    const Vec<float> found = function(load(x));
    for (std::int64_t i = 0; i < kLanes; ++i) largest = std::max(largest, ulps(found[i], exact(double{x[i]})));
  }
  return largest;
}

#define KPIG_FUNCTION(name) [](auto x) { return kpig::rowmath::name(x); }

void test_errors(std::uint32_t stride) {
  const auto exp = KPIG_FUNCTION(exp);
  const auto expm1 = KPIG_FUNCTION(expm1);
  const auto log_mean_exp = KPIG_FUNCTION(log_mean_exp);
  const auto tanh = KPIG_FUNCTION(tanh);
  const auto true_exp = [](double x) { return std::exp(x); };
  const auto true_expm1 = [](double x) { return std::expm1(x); };
  const auto true_log_mean_exp = [](double x) { return std::log1p(std::expm1(x) / 2); };
  const auto true_tanh = [](double x) { return std::tanh(x); };
  const auto at_most = [](double limit, double found, const char* what) {
    expect(found <= limit, what, found, limit);
    std::printf("%-24s %.3f ulp\n", what, found);
  };
  at_most(2, worst(exp, true_exp, -0.0f, -87.3365f, stride), "exp, x <= 0");
  at_most(2, worst(exp, true_exp, 0.0f, 88.0f, stride), "exp, x >= 0");
  at_most(2, worst(expm1, true_expm1, -0.0f, -1e4f, stride), "expm1, x <= 0");
  at_most(2, worst(expm1, true_expm1, 0.0f, 88.0f, stride), "expm1, x >= 0");
  at_most(2, worst(log_mean_exp, true_log_mean_exp, -0.0f, -1e4f, stride), "log_mean_exp");
  at_most(3, worst(tanh, true_tanh, 0.0f, 1e4f, stride), "tanh, x >= 0");
  at_most(3, worst(tanh, true_tanh, -0.0f, -1e4f, stride), "tanh, x <= 0");
}

void test_special_values() {
  const auto same = [](auto function, float x, float wanted, const char* what) {
    expect(std::bit_cast<std::uint32_t>(vector_value(function, x)) == std::bit_cast<std::uint32_t>(wanted), what,
           vector_value(function, x), wanted);
  };
  const auto exp = KPIG_FUNCTION(exp);
  const auto expm1 = KPIG_FUNCTION(expm1);
  const auto log_mean_exp = KPIG_FUNCTION(log_mean_exp);
  const auto tanh = KPIG_FUNCTION(tanh);
  same(exp, 0.0f, 1.0f, "exp(0)");
  same(exp, -kInfinity, 0.0f, "exp(-inf)");
  same(exp, -1e30f, 0.0f, "exp(-1e30)");
  same(expm1, 0.0f, 0.0f, "expm1(0)");
  same(expm1, -kInfinity, -1.0f, "expm1(-inf)");
  same(log_mean_exp, 0.0f, 0.0f, "log_mean_exp(0)");
  same(log_mean_exp, -kInfinity, static_cast<float>(-std::log(2.0)), "log_mean_exp(-inf)");
  same(tanh, kInfinity, 1.0f, "tanh(inf)");
  same(tanh, -kInfinity, -1.0f, "tanh(-inf)");
  for (const float found : {vector_value(exp, kNan), vector_value(expm1, kNan), vector_value(log_mean_exp, kNan),
                            vector_value(tanh, kNan)}) {
    expect(std::isnan(found), "NaN stays NaN", found, kNan);
  }
}

// One lane must not know of the others: attention and loss rows end inside a vector.
void test_lanes_are_independent() {
  constexpr auto kLanes = kpig::KPIG_ISA::kLanes<float>;
  float x[kLanes];
  for (std::int64_t i = 0; i < kLanes; ++i) x[i] = -0.37f * static_cast<float>(i * i);
  const auto together = kpig::rowmath::exp(load(x));
  for (std::int64_t i = 0; i < kLanes; ++i) {
    const float alone = vector_value(KPIG_FUNCTION(exp), x[i]);
    expect(together[i] == alone, "exp of a lane", together[i], alone);
  }
}

void test_parts_and_sums() {
  constexpr auto kLanes = kpig::KPIG_ISA::kLanes<float>;
  float x[kLanes] = {3, -1, 4};
  const auto part = kpig::KPIG_ISA::load_part(x, 3, -kInfinity);
  expect(kpig::KPIG_ISA::max_lane<float>(part) == 4, "max_lane", kpig::KPIG_ISA::max_lane<float>(part), 4);
  const auto whole = kpig::KPIG_ISA::load_part(x, 3, 0.0f);
  expect(kpig::KPIG_ISA::sum_lanes<float>(whole) == 6, "sum_lanes", kpig::KPIG_ISA::sum_lanes<float>(whole), 6);
  float y[kLanes] = {};
  kpig::KPIG_ISA::store_part(y, kpig::KPIG_ISA::splat(7.0f), 2);
  expect(y[1] == 7 && y[2] == 0, "store_part", y[2], 0);
}

void test_double() {
  const double x[] = {-700.5, -3.25, -1e-9, 0.0};
  for (const double value : x) {
    const auto v = kpig::KPIG_ISA::splat(value);
    expect(kpig::rowmath::exp(v)[0] == std::exp(value), "exp of double", kpig::rowmath::exp(v)[0], std::exp(value));
    const double exact = std::log1p(std::expm1(value) / 2);
    expect(kpig::rowmath::log_mean_exp(v)[1] == exact, "log_mean_exp of double", kpig::rowmath::log_mean_exp(v)[1],
           exact);
    const double bent = kpig::rowmath::tanh(value);
    expect(std::abs(bent - std::tanh(value)) <= 4e-16 * std::abs(bent), "tanh of double", bent, std::tanh(value));
  }
}

}  // namespace

int main(int count, char**) {
  if (!kpig::cpu::supports(kpig::cpu::Isa::KPIG_ISA)) {
    std::puts("this machine lacks the instruction set: nothing tested");
    return 0;
  }
  // With an argument every float, which takes minutes, instead of one in a thousand.
  test_errors(count > 1 ? 1 : 1021);
  test_special_values();
  test_lanes_are_independent();
  test_parts_and_sums();
  test_double();
  return kpig::tests::exit_code();
}

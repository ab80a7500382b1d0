// Random inputs of test programs, and how far a result may lie from one that is computed in more digits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "tests/check.hpp"

namespace kpig::tests {

// In exactly as much memory as it needs, so that AddressSanitizer sees a read or write beside it.
template <class T>
std::vector<T> normal(std::int64_t n, unsigned seed, double deviation = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> draw(0, deviation);
  std::vector<T> numbers(static_cast<std::size_t>(n));
  for (auto& number : numbers) number = static_cast<T>(draw(generator));
  return numbers;
}

// `roundings` of T of the larger of 1 and the exact value.
template <class T>
void expect_close(T found, long double exact, double roundings, const char* what) {
  const long double allowed = roundings * std::numeric_limits<T>::epsilon() * std::max(1.0L, std::abs(exact));
  expect(std::abs(static_cast<long double>(found) - exact) <= allowed, what, static_cast<double>(found),
         static_cast<double>(exact));
}

}  // namespace kpig::tests

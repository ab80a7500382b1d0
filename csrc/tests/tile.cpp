// The matrix products of csrc/cpu/tile.hpp against plain loops, in the instruction set that this program is compiled
// for.
#include "cpu/tile.hpp"

#include <cstdio>
#include <vector>

#include "cpu/isa.hpp"
#include "tests/numbers.hpp"

namespace {

using kpig::cpu::kQueryBlock;
using kpig::cpu::kTileRows;
using kpig::tests::expect;
using kpig::tests::expect_close;
using kpig::tests::normal;
using std::size_t;

// Rows of their own memory each, so that no sum runs from one into the next.
template <class T>
struct Rows {
  std::vector<std::vector<T>> rows;
  std::vector<T*> pointers;

  Rows(std::int64_t n, std::int64_t size, unsigned seed) {
    for (std::int64_t i = 0; i < n; ++i) rows.push_back(normal<T>(size, seed + static_cast<unsigned>(i)));
    for (auto& row : rows) pointers.push_back(row.data());
  }
  T* const* data() const { return pointers.data(); }
  T at(std::int64_t i, std::int64_t j) const { return rows[static_cast<size_t>(i)][static_cast<size_t>(j)]; }
};

template <class T>
void test_products(std::int64_t n, std::int64_t inner) {
  const Rows<T> rows(n, inner, 1);
  const auto columns = normal<T>(inner * kQueryBlock, 99);
  std::vector<T> found(static_cast<size_t>(n * kQueryBlock), T{7});
  kpig::KPIG_ISA::products<T>(rows.data(), n, inner, columns.data(), found.data());
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t q = 0; q < kQueryBlock; ++q) {
      long double exact = 0;
      for (std::int64_t x = 0; x < inner; ++x) {
        exact += static_cast<long double>(rows.at(i, x)) * columns[static_cast<size_t>(x * kQueryBlock + q)];
      }
      expect_close(found[static_cast<size_t>(i * kQueryBlock + q)], exact, static_cast<double>(2 * inner), "products");
    }
  }
  // Whichever rows stand beside it, a row gives the same bits.
  std::vector<T*> last(static_cast<size_t>(kTileRows), rows.data()[n - 1]);
  std::vector<T> again(static_cast<size_t>(kTileRows * kQueryBlock));
  kpig::KPIG_ISA::products<T>(last.data(), kTileRows, inner, columns.data(), again.data());
  for (std::int64_t q = 0; q < kQueryBlock; ++q) {
    const T here = again[static_cast<size_t>(q)], there = found[static_cast<size_t>((n - 1) * kQueryBlock + q)];
    expect(here == there, "a row of products", here, there);
  }
}

template <class T>
void test_accumulate(std::int64_t n, std::int64_t inner, std::int64_t width, bool transposed) {
  const auto row_step = transposed ? 1 : inner, step = transposed ? n : 1;
  const auto a = normal<T>(n * inner, 5);
  const Rows<T> b(inner, width, 17), before(n, width, 4321);
  const Rows<T> c(n, width, 4321);
  kpig::KPIG_ISA::accumulate<T>(n, a.data(), row_step, step, inner, b.data(), c.data(), width);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t x = 0; x < width; ++x) {
      long double exact = before.at(i, x);
      for (std::int64_t j = 0; j < inner; ++j) {
        exact += static_cast<long double>(a[static_cast<size_t>(i * row_step + j * step)]) * b.at(j, x);
      }
      expect_close(c.at(i, x), exact, static_cast<double>(2 * inner + 1), "accumulate");
    }
  }
}

template <class T>
void test_all() {
  for (const std::int64_t inner : {1, 3, 16, 80}) {
    for (const std::int64_t n : {1, 2, 5}) test_products<T>(n * kTileRows, inner);
  }
  for (const std::int64_t width : {16, 32, 48, 80, 256}) {
    for (const std::int64_t inner : {0, 1, 5, 64}) {
      for (std::int64_t n = 1; n <= 2 * kTileRows + 1; ++n) {
        test_accumulate<T>(n, inner, width, false);
        test_accumulate<T>(n, inner, width, true);
      }
    }
  }
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

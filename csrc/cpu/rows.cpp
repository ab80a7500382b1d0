#include "cpu/rows.hpp"

#include <algorithm>

#include "cpu/parallel.hpp"
#include "cpu/rows_kernels.hpp"

namespace kpig::cpu {
namespace {

// Columns that are worth the taking of a task.
constexpr std::int64_t kTaskColumns = 1 << 14;

template <class Function>
void each_row(std::int64_t rows, std::int64_t columns, int threads, Function row) {
  const auto size = std::max<std::int64_t>(1, kTaskColumns / std::max<std::int64_t>(1, columns));
  parallel_for((rows + size - 1) / size, threads, [&](std::int64_t task, int) {
    for (auto i = task * size; i < std::min(rows, (task + 1) * size); ++i) row(i);
  });
}

}  // namespace

template <class T>
void score_tile(const Rows<T>& tile, std::int64_t first_column, const Scores<T>& scores, int threads) {
  const auto kernel = KPIG_IN_USE(score_row<T>);
  each_row(tile.n, tile.columns, threads, [&](std::int64_t i) { kernel(tile, i, first_column, scores); });
}

template <class T>
void logprob_rows(const Rows<T>& z, const std::int64_t* target, const T* upstream, T* out, int threads) {
  const auto kernel = KPIG_IN_USE(logprob_row<T>);
  each_row(z.n, z.columns, threads, [&](std::int64_t i) { kernel(z, i, target, upstream, out); });
}

template <class T>
void jsd_rows(const Rows<T>& z, const Rows<T>& reference, const T* temperature, const T* upstream, T* out,
              int threads) {
  const auto kernel = KPIG_IN_USE(jsd_row<T>);
  each_row(z.n, z.columns, threads, [&](std::int64_t i) { kernel(z, reference, i, temperature, upstream, out); });
}

#define KPIG_INSTANTIATE(T)                                                           \
  template void score_tile(const Rows<T>&, std::int64_t, const Scores<T>&, int);      \
  template void logprob_rows(const Rows<T>&, const std::int64_t*, const T*, T*, int); \
  template void jsd_rows(const Rows<T>&, const Rows<T>&, const T*, const T*, T*, int);
KPIG_INSTANTIATE(float)
KPIG_INSTANTIATE(double)

}  // namespace kpig::cpu

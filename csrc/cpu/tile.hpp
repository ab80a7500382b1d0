// Products of small matrices whose rows lie anywhere, kept in registers while they are summed up.
//
// Sums go over the inner dimension in one order, so that a result does not depend on how rows are put together.
#pragma once

#include <cstdint>

#include "cpu/attention.hpp"
#include "cpu/vec.hpp"

namespace kpig::KPIG_ISA {

using cpu::kQueryBlock;
using cpu::kTileRows;

// Vectors of a tile's row: with kTileRows rows, as many sums as there are registers for.
inline constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

// Long sums of products are made of sums of this many terms: less rounding, at no cost.
inline constexpr std::int64_t kTerms = 32;

// s[r, :] = sum over from <= x < stop of rows[r][x] · columns[x, :], for kRows rows and kVectors vectors of columns;
// from the second piece on it is added to s.
template <int kRows, int kVectors, class T>
KPIG_ROWMATH void product_tile(const T* const* rows, std::int64_t from, std::int64_t stop, const T* columns, T* s) {
  Vec<T> sums[kRows][kVectors] = {};
  const T* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  for (auto x = from; x < stop; ++x) {
    Vec<T> b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = load(columns + x * kQueryBlock + v * kLanes<T>);
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> a = splat(row[r][x]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a * b[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      T* to = s + r * kQueryBlock + v * kLanes<T>;
      store(to, from == 0 ? sums[r][v] : load(to) + sums[r][v]);
    }
  }
}

// s[n, kQueryBlock] = rows [n, inner] · columns [inner, kQueryBlock]; n a multiple of kTileRows.
template <class T>
void products(const T* const* rows, std::int64_t n, std::int64_t inner, const T* columns, T* s) {
  for (std::int64_t r = 0; r < n; r += kTileRows) {
    for (std::int64_t v = 0; v < kQueryBlock; v += kTileVectors * kLanes<T>) {
      for (std::int64_t x = 0; x < inner; x += kTerms) {
        const auto stop = x + kTerms < inner ? x + kTerms : inner;
        product_tile<kTileRows, kTileVectors>(rows + r, x, stop, columns + v, s + r * kQueryBlock + v);
      }
    }
  }
}

// c[r][at : at + kVectors lanes] += sum_j a[r · row_step + j · step] · b[j][at : …] for kRows rows.
template <int kRows, int kVectors, class T>
KPIG_ROWMATH void accumulate_tile(const T* a, std::int64_t row_step, std::int64_t step, std::int64_t inner,
                                  const T* const* b, T* const* c, std::int64_t at) {
  Vec<T> sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load(c[r] + at + v * kLanes<T>);
  }
  for (std::int64_t j = 0; j < inner; ++j) {
    Vec<T> x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(b[j] + at + v * kLanes<T>);
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> factor = splat(a[r * row_step + j * step]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * x[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(c[r] + at + v * kLanes<T>, sums[r][v]);
  }
}

// The last kRows rows or fewer.
template <int kRows, class T>
void accumulate_rows(std::int64_t n, const T* a, std::int64_t row_step, std::int64_t step, std::int64_t inner,
                     const T* const* b, T* const* c, std::int64_t width) {
  if constexpr (kRows > 0) {
    if (n < kRows) return accumulate_rows<kRows - 1>(n, a, row_step, step, inner, b, c, width);
    std::int64_t at = 0;
    for (; at + kTileVectors * kLanes<T> <= width; at += kTileVectors * kLanes<T>) {
      accumulate_tile<kRows, kTileVectors>(a, row_step, step, inner, b, c, at);
    }
    for (; at < width; at += kLanes<T>) accumulate_tile<kRows, 1>(a, row_step, step, inner, b, c, at);
  }
}

// c [n, width] += a [n, inner] · b [inner, width]; a(i, j) stands at a[i · row_step + j · step]; width in whole
// vectors.
template <class T>
void accumulate(std::int64_t n, const T* a, std::int64_t row_step, std::int64_t step, std::int64_t inner,
                const T* const* b, T* const* c, std::int64_t width) {
  for (std::int64_t i = 0; i < n; i += kTileRows) {
    const auto rows = n - i < kTileRows ? n - i : kTileRows;
    accumulate_rows<static_cast<int>(kTileRows)>(rows, a + i * row_step, row_step, step, inner, b, c + i, width);
  }
}

}  // namespace kpig::KPIG_ISA

// Built once for each instruction set. A row is swept several times while it is in the cache; what is known of a row
// (maximum, sums) is carried in double, since it enters every entry.
#include "cpu/rows_kernels.hpp"

#include <cmath>
#include <limits>

#include "cpu/vec.hpp"
#include "rowmath/divergence.hpp"

namespace kpig::KPIG_ISA {
namespace {

using cpu::Rows;
using cpu::Transform;
using rowmath::kFar;
using rowmath::kLn2;
using rowmath::maximum;
using rowmath::slope;

template <class T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

// each(at, lanes) for every vector of a row of n: the last one may have fewer lanes.
template <class T, class Function>
KPIG_ROWMATH void each_vector(std::int64_t n, Function each) {
  std::int64_t at = 0;
  for (; at + kLanes<T> <= n; at += kLanes<T>) each(at, kLanes<T>);
  if (at < n) each(at, n - at);
}

template <class T>
KPIG_ROWMATH Vec<T> load_up_to(const T* from, std::int64_t lanes, T fill) {
  return lanes == kLanes<T> ? load(from) : load_part(from, lanes, fill);
}

template <class T>
KPIG_ROWMATH void store_up_to(T* to, Vec<T> x, std::int64_t lanes) {
  lanes == kLanes<T> ? store(to, x) : store_part(to, x, lanes);
}

// A sum of very many terms, in runs that are added up apart: rounding grows with the length of a run and their number.
template <class T>
class LongSum {
 public:
  KPIG_ROWMATH void add(Vec<T> x) {
    run_ += x;
    if (++length_ == kRun) {
      whole_ += run_;
      run_ = Vec<T>{};
      length_ = 0;
    }
  }

  double value() const {
    double sum = 0;
    for (std::int64_t lane = 0; lane < kLanes<T>; ++lane) sum += static_cast<double>(whole_[lane]) + run_[lane];
    return sum;
  }

 private:
  static constexpr int kRun = 64;
  Vec<T> run_ = {}, whole_ = {};
  int length_ = 0;
};

// Raw products become logits / temperature; their maximum.
template <class T>
T transform_row(T* z, std::int64_t n, const Transform<T>& transform, T temperature) {
  Vec<T> top = splat(kNone<T>);
  const bool plain = transform.bias == nullptr && transform.scale == 1 && transform.softcap == 0 && temperature == 1;
  each_vector<T>(n, [&](std::int64_t at, std::int64_t lanes) {
    if (!plain) {
      Vec<T> x = load_up_to(z + at, lanes, T{});
      if (transform.bias != nullptr) x += load_up_to(transform.bias + at, lanes, T{});
      store_up_to<T>(z + at, rowmath::to_logit<Vec<T>>(x, transform) / temperature, lanes);
    }
    top = maximum<Vec<T>>(top, load_up_to(z + at, lanes, kNone<T>));
  });
  return max_lane<T>(top);
}

// Sum of e^(z - top).
template <class T>
double sum_of_exponentials(const T* z, std::int64_t n, T top) {
  LongSum<T> sum;
  each_vector<T>(n, [&](std::int64_t at, std::int64_t lanes) {
    sum.add(rowmath::exp<Vec<T>>(load_up_to(z + at, lanes, kNone<T>) - top));
  });
  return sum.value();
}

}  // namespace

template <class T>
void score_row(const Rows<T>& tile, std::int64_t i, std::int64_t first_column, const cpu::Scores<T>& scores) {
  T* z = tile.row(i);
  const T top = maximum(scores.top[i], transform_row(z, tile.columns, tile.transform, T{1}));
  const auto column = scores.target[i] - first_column;
  if (column >= 0 && column < tile.columns) scores.picked[i] = z[column];
  // So far a bias of -inf rules every token out.
  if (top == kNone<T> && scores.sum[i] == 0) return;
  const T old_sum = scores.sum[i] * std::exp(scores.top[i] - top);
  scores.sum[i] = old_sum + static_cast<T>(sum_of_exponentials(z, tile.columns, top));
  scores.top[i] = top;
}

template <class T>
void logprob_row(const Rows<T>& rows, std::int64_t i, const std::int64_t* target, const T* upstream, T* out) {
  T* z = rows.row(i);
  const auto n = rows.columns;
  if (target[i] == cpu::kIgnore) {
    out[i] = 0;
    if (upstream != nullptr) each_vector<T>(n, [&](auto at, auto lanes) { store_up_to<T>(z + at, Vec<T>{}, lanes); });
    return;
  }
  const T top = transform_row(z, n, rows.transform, T{1});
  const double sum = sum_of_exponentials(z, n, top);
  const T chosen = z[target[i]];
  const double log_p = (static_cast<double>(chosen) - top) - std::log(sum);
  out[i] = static_cast<T>(log_p > 0 ? 0 : log_p);
  if (upstream == nullptr) return;
  const T factor = -upstream[i], share = static_cast<T>(factor / sum);
  each_vector<T>(n, [&](std::int64_t at, std::int64_t lanes) {
    const Vec<T> x = load_up_to(z + at, lanes, T{});
    store_up_to<T>(z + at, rowmath::exp<Vec<T>>(x - top) * share * slope<Vec<T>>(rows.transform, x), lanes);
  });
  // 1 - p from log p keeps its relative accuracy where p is near 1.
  z[target[i]] = static_cast<T>(std::expm1(log_p)) * factor * slope<T>(rows.transform, chosen);
}

template <class T>
void jsd_row(const Rows<T>& rows, const Rows<T>& reference, std::int64_t i, const T* temperature, const T* upstream,
             T* out) {
  T *z = rows.row(i), *r = reference.row(i);
  const auto n = rows.columns;
  const T t = temperature[i];
  const T z_top = transform_row(z, n, rows.transform, t), r_top = transform_row(r, n, reference.transform, t);
  const double z_sum = sum_of_exponentials(z, n, z_top), r_sum = sum_of_exponentials(r, n, r_top);
  const T z_share = static_cast<T>(1 / z_sum), r_share = static_cast<T>(1 / r_sum);
  // In two parts: a rounding of it would move every entry the same way.
  const double whole_shift = (static_cast<double>(r_top) - z_top) + std::log(r_sum / z_sum);
  const T shift = static_cast<T>(whole_shift), shift_rest = static_cast<T>(whole_shift - shift);
  LongSum<T> kl_p, kl_q;
  each_vector<T>(n, [&](std::int64_t at, std::int64_t lanes) {
    const Vec<T> a = rowmath::not_below_far<Vec<T>>(load_up_to(z + at, lanes, kFar<T>));
    const Vec<T> b = rowmath::not_below_far<Vec<T>>(load_up_to(r + at, lanes, kFar<T>));
    const Vec<T> p = rowmath::exp<Vec<T>>(a - z_top) * z_share, q = rowmath::exp<Vec<T>>(b - r_top) * r_share;
    // The difference of two close logits is exact, that of two log-probs is not.
    const auto log_ratio = rowmath::log_ratios<Vec<T>>(((b - a) - shift) - shift_rest);
    kl_p.add(p * log_ratio.p);
    kl_q.add(q * log_ratio.q);
    if (upstream != nullptr) {
      store_up_to<T>(z + at, log_ratio.p, lanes);
      store_up_to<T>(r + at, p * slope<Vec<T>>(rows.transform, a * t), lanes);
    }
  });
  const double from_p = kl_p.value(), from_q = kl_q.value(), bits = (from_p + from_q) / (2 * kLn2);
  out[i] = static_cast<T>(bits < 0 ? 0 : bits);
  if (upstream == nullptr) return;
  const T kl = static_cast<T>(from_p), factor = static_cast<T>(upstream[i] / (2 * kLn2 * t));
  each_vector<T>(n, [&](std::int64_t at, std::int64_t lanes) {
    const Vec<T> log_pm = load_up_to(z + at, lanes, T{}), p = load_up_to(r + at, lanes, T{});
    store_up_to<T>(z + at, (log_pm - kl) * factor * p, lanes);
  });
}

#define KPIG_INSTANTIATE(T)                                                                   \
  template void score_row(const Rows<T>&, std::int64_t, std::int64_t, const cpu::Scores<T>&); \
  template void logprob_row(const Rows<T>&, std::int64_t, const std::int64_t*, const T*, T*); \
  template void jsd_row(const Rows<T>&, const Rows<T>&, std::int64_t, const T*, const T*, T*);
KPIG_INSTANTIATE(float)
KPIG_INSTANTIATE(double)

}  // namespace kpig::KPIG_ISA

// The row passes of csrc/cuda without a GPU: slices and cluster sizes, and the phases of a cluster's threads one after
// another, against plain loops in more digits and against the CPU kernels.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/rows.hpp"
#include "cuda/phases.hpp"
#include "cuda/slices.hpp"
#include "tests/exact_rows.hpp"
#include "tests/numbers.hpp"

namespace {

using namespace kpig::cuda;
using kpig::rowmath::kIgnore;
using kpig::rowmath::kLn2;
using kpig::rowmath::Rows;
using kpig::tests::Exact;
using kpig::tests::expect;
using kpig::tests::normal;
using kpig::tests::true_jsd;
using kpig::tests::true_logprob;
using kpig::tests::Truth;
using std::size_t;
using Numbers = std::vector<float>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr Exact kEpsilon = std::numeric_limits<float>::epsilon();
constexpr std::int64_t kRows = 3;

// Rounded to nearest, ties to even, as the GPU's type of this name.
struct BFloat16 {
  std::uint16_t bits = 0;

  BFloat16() = default;
  explicit BFloat16(float x) {
    const auto all = std::bit_cast<std::uint32_t>(x);
    bits = static_cast<std::uint16_t>((all + 0x7fff + ((all >> 16) & 1)) >> 16);
  }
};

enum class Kind { kPlain, kBent, kUnderflow, kClose, kRuledOut, kSure };

struct Problem {
  std::int64_t columns, stride;
  Kind kind;
  Numbers z, r, bias, temperature{0.75f, 1.3f, 2.2f}, upstream{0.7f, -1.4f, 2.1f};
  std::vector<std::int64_t> target;

  Problem(std::int64_t columns, Kind kind)
      : columns(columns), stride((columns + 63) / 64 * 64), kind(kind), target{columns - 1, kIgnore, columns / 3} {
    const double size = kind == Kind::kUnderflow ? 1e4 : 3;
    z = normal<float>(kRows * stride, 1, size);
    r = normal<float>(kRows * stride, 2, kind == Kind::kClose ? 1e-3 : size);
    if (kind == Kind::kClose) {
      // The same distributions nearly, but not the same log-sum-exps.
      for (size_t at = 0; at < z.size(); ++at) r[at] += z[at] + 3.3f;
    }
    if (kind == Kind::kSure) {
      for (const std::int64_t i : {0, 2}) z[static_cast<size_t>(i * stride + target[static_cast<size_t>(i)])] += 20;
    }
    if (kind == Kind::kBent || kind == Kind::kRuledOut) bias = normal<float>(columns, 3);
    if (kind == Kind::kRuledOut) {
      for (size_t v = 2; v < bias.size(); v += 7) bias[v] = kNone;
    }
    // What no row owns must not be taken for a column.
    for (auto* side : {&z, &r}) {
      for (std::int64_t at = 0; at < kRows * stride; ++at) {
        if (at % stride >= columns) (*side)[static_cast<size_t>(at)] = kNaN;
      }
    }
  }

  Rows<float> rows(Numbers& data) const {
    const bool bent = kind == Kind::kBent;
    return {
        data.data(), kRows, columns, stride, {bias.empty() ? nullptr : bias.data(), bent ? 1.7f : 1, bent ? 2.5f : 0}};
  }
};

// A cluster's shared memory for one side, each slice in exactly as much as it needs for AddressSanitizer.
struct Cluster {
  std::vector<Slice> slices;
  std::vector<std::vector<Vector>> memory;

  Cluster(std::int64_t columns, int blocks) {
    for (int rank = 0; rank < blocks; ++rank) {
      slices.push_back(slice_of(columns, blocks, rank));
      memory.emplace_back(static_cast<size_t>((slices.back().columns + kLanes - 1) / kLanes));
    }
  }

  template <class Function>
  void each_thread(Function function) {
    for (size_t rank = 0; rank < slices.size(); ++rank) {
      for (int index = 0; index < kThreads; ++index) {
        function(memory[rank].data(), slices[rank], Thread{index, kThreads}, rank);
      }
    }
  }

  void load(const Rows<float>& rows, std::int64_t i) {
    each_thread([&](Vector* slice, const Slice& part, Thread thread, size_t) {
      fetch(slice, rows.row(i) + part.begin, part.columns, thread);
    });
  }

  float transform(const Rows<float>& rows, float temperature) {
    float top = kNone;
    each_thread([&](Vector* slice, const Slice& part, Thread thread, size_t) {
      const float* bias = rows.transform.bias == nullptr ? nullptr : rows.transform.bias + part.begin;
      top = std::max(top, transform_slice(slice, part.columns, thread, rows.transform, bias, temperature));
    });
    return top;
  }

  double sum(float top) {
    double all = 0;
    each_thread([&](Vector* slice, const Slice& part, Thread thread, size_t) {
      all += sum_of_exponentials(slice, part.columns, thread, top);
    });
    return all;
  }
};

template <class T>
void logprob_row(const Rows<float>& rows, std::int64_t i, int blocks, const Problem& problem, Numbers& out) {
  const auto row = static_cast<size_t>(i);
  const auto target = problem.target[row];
  const float upstream = problem.upstream[row];
  Cluster z(rows.columns, blocks);
  T* gradient = reinterpret_cast<T*>(rows.row(i));
  if (target == kIgnore) {
    out[row] = 0;
    z.each_thread([&](Vector*, const Slice& part, Thread thread, size_t) {
      store_zeros(gradient + part.begin, part.columns, thread);
    });
    return;
  }
  z.load(rows, i);
  const float top = z.transform(rows, 1);
  const double sum = z.sum(top);
  z.each_thread([&](Vector* slice, const Slice& part, Thread thread, size_t) {
    const auto share = static_cast<float>(-upstream / sum);
    store_probs(slice, part.columns, thread, rows.transform, top, share, gradient + part.begin);
    const auto column = target - part.begin;
    if (column < 0 || column >= part.columns || !thread.visits(column)) return;
    const float chosen = slice[column / kLanes].lane[column % kLanes];
    const double log_p = log_prob(chosen, top, sum);
    out[row] = static_cast<float>(log_p > 0 ? 0 : log_p);
    gradient[target] = static_cast<T>(target_gradient(log_p, chosen, rows.transform, upstream));
  });
}

template <class T>
void jsd_row(const Rows<float>& rows, const Rows<float>& reference, std::int64_t i, int blocks, const Problem& problem,
             Numbers& out) {
  const auto row = static_cast<size_t>(i);
  const float t = problem.temperature[row];
  Cluster z(rows.columns, blocks), r(rows.columns, blocks);
  z.load(rows, i);
  r.load(reference, i);
  const float z_top = z.transform(rows, t), r_top = r.transform(reference, t);
  const auto pair = row_pair(z_top, r_top, z.sum(z_top), r.sum(r_top));
  Each<2> kl{};
  z.each_thread([&](Vector* slice, const Slice& part, Thread thread, size_t rank) {
    const auto own = divergences(slice, r.memory[rank].data(), part.columns, thread, pair, rows.transform, t);
    for (int side = 0; side < 2; ++side) kl.side[side] += own.side[side];
  });
  out[row] = bits(kl);
  z.each_thread([&](Vector* slice, const Slice& part, Thread thread, size_t rank) {
    const auto factor = static_cast<float>(problem.upstream[row] / (2 * kLn2 * t));
    store_divergence_gradient(slice, r.memory[rank].data(), part.columns, thread, static_cast<float>(kl.side[0]),
                              factor, reinterpret_cast<T*>(rows.row(i)) + part.begin);
  });
}

Exact norm(const std::vector<Exact>& x) {
  Exact sum = 0;
  for (const auto value : x) sum += value * value;
  return std::sqrt(sum);
}

Exact error(const float* found, const std::vector<Exact>& exact) {
  std::vector<Exact> difference;
  for (size_t v = 0; v < exact.size(); ++v) difference.push_back(found[v] - exact[v]);
  return norm(difference);
}

// At most twice as far from the truth as the CPU kernel, which now and then is right by luck.
void expect_as_exact(Exact found, Exact of_cpu, Exact size, const char* what) {
  const Exact allowed = 2 * of_cpu + 2 * kEpsilon * size;
  expect(found <= allowed, what, static_cast<double>(found), static_cast<double>(allowed));
}

// One of the two passes, by the CPU kernels and by clusters of each size.
template <class OnCpu, class ByCluster>
void compare(const Problem& problem, const std::vector<Truth>& truths, OnCpu on_cpu, ByCluster by_cluster,
             const char* what) {
  Numbers cpu = problem.z, cpu_out(kRows);
  on_cpu(problem.rows(cpu), cpu_out);
  for (const int blocks : {1, 2, 4, 8}) {
    Numbers z = problem.z, half = problem.z, out(kRows, kNaN), half_out(kRows, kNaN);
    for (std::int64_t i = 0; i < kRows; ++i) {
      by_cluster.template operator()<float>(problem.rows(z), i, blocks, out);
      by_cluster.template operator()<BFloat16>(problem.rows(half), i, blocks, half_out);
      const auto row = static_cast<size_t>(i), begin = row * static_cast<size_t>(problem.stride);
      const auto& truth = truths[row];
      expect_as_exact(std::abs(out[row] - truth.out), std::abs(cpu_out[row] - truth.out), truth.out_size, what);
      expect_as_exact(error(&z[begin], truth.gradient), error(&cpu[begin], truth.gradient), norm(truth.gradient_size),
                      what);
      expect(half_out[row] == out[row], "result with a gradient in half precision", half_out[row], out[row]);
      std::vector<std::uint16_t> stored(static_cast<size_t>(2 * problem.stride));
      std::memcpy(stored.data(), &half[begin], stored.size() * sizeof(stored[0]));
      for (size_t v = 0; v < truth.gradient.size(); ++v) {
        expect(stored[v] == BFloat16(z[begin + v]).bits, "gradient in half precision", stored[v], z[begin + v]);
      }
      const auto bytes = static_cast<size_t>(problem.columns) * sizeof(BFloat16), whole = begin * sizeof(float) + bytes;
      const auto rest = static_cast<size_t>(problem.stride) * sizeof(float) - bytes;
      const auto *now = reinterpret_cast<const char*>(half.data()),
                 *before = reinterpret_cast<const char*>(problem.z.data());
      expect(std::memcmp(now + whole, before + whole, rest) == 0, "behind a half-precision gradient", 1, 0);
      for (auto at = begin + truth.gradient.size(); at < begin + static_cast<size_t>(problem.stride); ++at) {
        expect(std::isnan(z[at]), "behind the last column", z[at], kNaN);
      }
    }
  }
}

void test_logprob(Problem problem) {
  std::vector<Truth> truths;
  for (size_t i = 0; i < kRows; ++i) {
    truths.push_back(
        true_logprob(problem.rows(problem.z), static_cast<std::int64_t>(i), problem.target[i], problem.upstream[i]));
  }
  compare(
      problem, truths,
      [&](const Rows<float>& rows, Numbers& out) {
        kpig::cpu::logprob_rows(rows, problem.target.data(), problem.upstream.data(), out.data(), 1);
      },
      [&]<class T>(const Rows<float>& rows, std::int64_t i, int blocks, Numbers& out) {
        logprob_row<T>(rows, i, blocks, problem, out);
      },
      "log-probs");
}

void test_jsd(Problem problem) {
  std::vector<Truth> truths;
  for (size_t i = 0; i < kRows; ++i) {
    truths.push_back(true_jsd(problem.rows(problem.z), problem.rows(problem.r), static_cast<std::int64_t>(i),
                              problem.temperature[i], problem.upstream[i]));
  }
  compare(
      problem, truths,
      [&](const Rows<float>& rows, Numbers& out) {
        Numbers r = problem.r;
        kpig::cpu::jsd_rows(rows, problem.rows(r), problem.temperature.data(), problem.upstream.data(), out.data(), 1);
      },
      [&]<class T>(const Rows<float>& rows, std::int64_t i, int blocks, Numbers& out) {
        jsd_row<T>(rows, problem.rows(problem.r), i, blocks, problem, out);
      },
      "divergences");
}

void test_nan_stays() {
  for (const int blocks : {1, 4}) {
    for (const std::int64_t at : {0, 40, 96}) {
      Problem problem(97, Kind::kPlain);
      problem.z[static_cast<size_t>(at)] = kNaN;
      Numbers out(kRows), z = problem.z;
      logprob_row<float>(problem.rows(z), 0, blocks, problem, out);
      for (size_t v = 0; v < 97; ++v) expect(std::isnan(z[v]), "NaN in a gradient of a log-prob", z[v], kNaN);
      expect(std::isnan(out[0]), "NaN in a log-prob", out[0], kNaN);
      jsd_row<float>(problem.rows(problem.z), problem.rows(problem.r), 0, blocks, problem, out);
      for (size_t v = 0; v < 97; ++v)
        expect(std::isnan(problem.z[v]), "NaN in a gradient of a divergence", problem.z[v], kNaN);
      expect(std::isnan(out[0]), "NaN in a divergence", out[0], kNaN);
    }
  }
}

void test_slices() {
  for (const std::int64_t columns : {1, 31, 32, 97, 255, 256, 257, 1003, 32001, 128256, 151936}) {
    for (const int blocks : {1, 2, 4, 8}) {
      std::int64_t covered = 0;
      for (int rank = 0; rank < blocks; ++rank) {
        const auto [begin, size] = slice_of(columns, blocks, rank);
        expect(begin == covered, "where a slice begins", static_cast<double>(begin), static_cast<double>(covered));
        expect(size == 0 || begin % kAlignment == 0, "alignment of a slice", static_cast<double>(begin), 0);
        expect(size >= 0 && size <= slice_columns(columns, blocks), "size of a slice", size, 0);
        covered += size;
      }
      expect(covered == columns, "columns in slices", static_cast<double>(covered), static_cast<double>(columns));
    }
  }
}

void expect_blocks(std::int64_t columns, int sides, std::int64_t kilobytes, int wanted) {
  expect(cluster_size(columns, sides, kilobytes * 1024) == wanted, "blocks of a cluster",
         cluster_size(columns, sides, kilobytes * 1024), wanted);
}

void test_cluster_sizes() {
  // 113 KB for each of two blocks: 28,672 columns, 112 KB, and 1 KB for reductions.
  expect_blocks(1, 1, 227, 1);
  expect_blocks(28672, 1, 227, 1);
  expect_blocks(28673, 1, 227, 2);
  expect_blocks(14336, 2, 227, 1);
  expect_blocks(14337, 2, 227, 2);
  expect_blocks(128256, 1, 227, 8);
  expect_blocks(128256, 2, 227, 8);
  // 226 KB for a block of the largest cluster: 57,856 columns of one side.
  expect_blocks(8 * 57856, 1, 227, 8);
  expect_blocks(8 * 57856 + 1, 1, 227, 0);
  expect_blocks(8 * 28928, 2, 227, 8);
  expect_blocks(8 * 28928 + 1, 2, 227, 0);
  expect_blocks(32001, 1, 99, 4);
  expect_blocks(128256, 2, 99, 0);
}

}  // namespace

int main() {
  test_slices();
  test_cluster_sizes();
  test_nan_stays();
  for (const std::int64_t columns : {1, 97, 1003, 32001, 128256}) {
    for (const auto kind : {Kind::kPlain, Kind::kBent, Kind::kUnderflow, Kind::kClose, Kind::kRuledOut, Kind::kSure}) {
      test_logprob({columns, kind});
      test_jsd({columns, kind});
    }
  }
  return kpig::tests::exit_code();
}

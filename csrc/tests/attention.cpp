// Tree attention and its gradients against plain loops in more digits, on every instruction set of this machine.
#include "cpu/attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <random>
#include <vector>

#include "cpu/isa.hpp"
#include "tests/numbers.hpp"

namespace {

using kpig::cpu::Heads;
using kpig::tests::expect;
using kpig::tests::expect_close;
using kpig::tests::normal;
using std::size_t;
using Exact = long double;

struct Forest {
  std::vector<std::int32_t> subtree_end, position;

  // Chains with a jump to an ancestor, or to a new root, every `run` tokens or so; new roots at the `roots`.
  Forest(std::int64_t tokens, std::int64_t run, std::initializer_list<std::int32_t> roots, unsigned seed)
      : subtree_end(static_cast<size_t>(tokens)) {
    std::mt19937 generator(seed);
    std::vector<std::int32_t> path;
    for (std::int32_t token = 0; token < tokens; ++token) {
      auto depth = path.size();
      if (generator() % static_cast<unsigned>(run) == 0) depth = generator() % (path.size() + 1);
      if (std::find(roots.begin(), roots.end(), token) != roots.end()) depth = 0;
      for (auto i = depth; i < path.size(); ++i) subtree_end[static_cast<size_t>(path[i])] = token;
      path.resize(depth);
      position.push_back(static_cast<std::int32_t>(depth));
      path.push_back(token);
    }
    for (const auto token : path) subtree_end[static_cast<size_t>(token)] = static_cast<std::int32_t>(tokens);
  }

  bool sees(size_t q, size_t k, std::int32_t window) const {
    const bool above = k <= q && static_cast<std::int32_t>(q) < subtree_end[k];
    return above && (window == 0 || position[q] - position[k] < window);
  }
};

struct Options {
  std::int64_t heads, kv_heads, tokens, d, dv, run;
  double softcap;
  std::int32_t window;
  bool sinks;
};

// [heads, T, size]; token after token in memory where `by_token`.
template <class T>
struct Tensor {
  std::int64_t heads, tokens, size;
  bool by_token;
  std::vector<T> numbers;

  Tensor(std::int64_t heads, std::int64_t tokens, std::int64_t size, bool by_token, unsigned seed)
      : heads(heads), tokens(tokens), size(size), by_token(by_token), numbers(normal<T>(heads * tokens * size, seed)) {}

  template <class U>
  Heads<U> view() {
    return {numbers.data(), by_token ? size : tokens * size, by_token ? heads * size : size};
  }
  T at(std::int64_t h, std::int64_t t, std::int64_t x) const {
    const auto row = by_token ? t * heads + h : h * tokens + t;
    return numbers[static_cast<size_t>(row * size + x)];
  }
};

template <class T>
class Problem {
 public:
  explicit Problem(const Options& options)
      : o(options),
        forest(o.tokens, o.run, {420, 422}, 11),
        q(o.heads, o.tokens, o.d, true, 1),
        k(o.kv_heads, o.tokens, o.d, false, 2),
        v(o.kv_heads, o.tokens, o.dv, true, 3),
        grad(o.heads, o.tokens, o.dv, false, 4),
        out(o.heads, o.tokens, o.dv, true, 5),
        dq(o.heads, o.tokens, o.d, true, 6),
        sinks(normal<T>(o.heads, 7)),
        lse(static_cast<size_t>(o.heads * o.tokens)),
        delta(lse.size()),
        dk(static_cast<size_t>(kSegments * o.tokens * o.kv_heads * o.d)),
        dv(static_cast<size_t>(kSegments * o.tokens * o.kv_heads * o.dv)) {}

  void run(int threads) {
    const kpig::cpu::TreeAttention<T> a{q.template view<const T>(),
                                        k.template view<const T>(),
                                        v.template view<const T>(),
                                        forest.subtree_end.data(),
                                        forest.position.data(),
                                        o.heads,
                                        o.kv_heads,
                                        o.tokens,
                                        o.d,
                                        o.dv,
                                        static_cast<T>(kScale),
                                        static_cast<T>(o.softcap),
                                        o.window,
                                        o.sinks ? sinks.data() : nullptr};
    kpig::cpu::tree_attention<T>(a, {out.template view<T>(), lse.data()}, threads);
    kpig::cpu::tree_attention_backward<T>(a,
                                          {grad.template view<const T>(), out.template view<const T>(), lse.data(),
                                           delta.data(), dq.template view<T>(), dk.data(), dv.data(), kSegments},
                                          threads);
  }

  void expect_exact() const {
    std::vector<Exact> exact_dk(static_cast<size_t>(o.tokens * o.kv_heads * o.d));
    std::vector<Exact> exact_dv(static_cast<size_t>(o.tokens * o.kv_heads * o.dv));
    for (std::int64_t h = 0; h < o.heads; ++h) {
      for (std::int64_t t = 0; t < o.tokens; ++t) expect_query(h, t, exact_dk, exact_dv);
    }
    expect_pieces(dk, exact_dk, "gradient by keys");
    expect_pieces(dv, exact_dv, "gradient by values");
  }

  std::vector<std::vector<T>> results() const { return {out.numbers, lse, dq.numbers, delta, dk, dv}; }

 private:
  static constexpr std::int64_t kSegments = 3;
  static constexpr double kScale = 0.25;
  // Scores up to 30 are rounded before their exponential; sums have up to 400 terms.
  static constexpr double kRoundings = 256;

  Exact dot(const Tensor<T>& a, std::int64_t h, std::int64_t t, const Tensor<T>& b, std::int64_t g,
            std::int64_t s) const {
    Exact sum = 0;
    for (std::int64_t x = 0; x < a.size; ++x) sum += static_cast<Exact>(a.at(h, t, x)) * b.at(g, s, x);
    return sum;
  }

  void expect_query(std::int64_t h, std::int64_t t, std::vector<Exact>& all_dk, std::vector<Exact>& all_dv) const {
    const auto kv = h / (o.heads / o.kv_heads);
    std::vector<std::int64_t> keys;
    std::vector<Exact> scores, slopes;
    Exact top = o.sinks ? static_cast<Exact>(sinks[static_cast<size_t>(h)]) : -INFINITY;
    for (std::int64_t s = 0; s <= t; ++s) {
      if (!forest.sees(static_cast<size_t>(t), static_cast<size_t>(s), o.window)) continue;
      const Exact raw = dot(q, h, t, k, kv, s) * kScale, bent = o.softcap == 0 ? 0 : std::tanh(raw / o.softcap);
      keys.push_back(s);
      scores.push_back(o.softcap == 0 ? raw : bent * o.softcap);
      slopes.push_back(1 - bent * bent);
      top = std::max(top, scores.back());
    }
    Exact total = o.sinks ? std::exp(sinks[static_cast<size_t>(h)] - top) : 0;
    for (const auto score : scores) total += std::exp(score - top);
    std::vector<Exact> mixed(static_cast<size_t>(o.dv)), by_query(static_cast<size_t>(o.d)), by_weight(keys.size());
    Exact mean = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      scores[i] = std::exp(scores[i] - top) / total;
      by_weight[i] = dot(grad, h, t, v, kv, keys[i]);
      mean += scores[i] * by_weight[i];
      for (std::int64_t x = 0; x < o.dv; ++x) {
        mixed[static_cast<size_t>(x)] += scores[i] * v.at(kv, keys[i], x);
        all_dv[static_cast<size_t>((keys[i] * o.kv_heads + kv) * o.dv + x)] += scores[i] * grad.at(h, t, x);
      }
    }
    for (size_t i = 0; i < keys.size(); ++i) {
      const Exact by_score = scores[i] * (by_weight[i] - mean) * slopes[i] * kScale;
      for (std::int64_t x = 0; x < o.d; ++x) {
        by_query[static_cast<size_t>(x)] += by_score * k.at(kv, keys[i], x);
        all_dk[static_cast<size_t>((keys[i] * o.kv_heads + kv) * o.d + x)] += by_score * q.at(h, t, x);
      }
    }
    const auto row = static_cast<size_t>(h * o.tokens + t);
    expect_close(lse[row], top + std::log(total), kRoundings, "log-sum-exp");
    expect_close(delta[row], mean, kRoundings, "sum of grad · out");
    for (std::int64_t x = 0; x < o.dv; ++x)
      expect_close(out.at(h, t, x), mixed[static_cast<size_t>(x)], kRoundings, "out");
    for (std::int64_t x = 0; x < o.d; ++x) {
      expect_close(dq.at(h, t, x), by_query[static_cast<size_t>(x)], kRoundings, "gradient by queries");
    }
  }

  void expect_pieces(const std::vector<T>& pieces, const std::vector<Exact>& exact, const char* what) const {
    for (size_t i = 0; i < exact.size(); ++i) {
      T sum = 0;
      for (size_t segment = 0; segment < kSegments; ++segment) sum += pieces[segment * exact.size() + i];
      expect_close(sum, exact[i], kRoundings, what);
    }
  }

  Options o;
  Forest forest;
  Tensor<T> q, k, v, grad, out, dq;
  std::vector<T> sinks, lse, delta, dk, dv;
};

template <class T>
void test_all() {
  const Options cases[] = {
      {2, 1, 1, 16, 16, 4, 0, 0, false},
      {2, 1, 0, 16, 16, 4, 0, 0, true},
      {2, 2, 63, 16, 32, 4, 2, 0, false},
      {4, 2, 64, 32, 16, 8, 0, 5, true},
      {6, 2, 65, 80, 80, 8, 0, 0, true},
      {2, 1, 191, 16, 16, 1000, 0, 0, false},
      {3, 1, 192, 16, 48, 1000, 3, 0, true},
      {2, 1, 193, 32, 16, 1000, 0, 150, false},
      {2, 2, 300, 16, 16, 60, 0, 2, false},
      {2, 1, 400, 16, 16, 200, 2.5, 0, true},
      // Two chunks of keys that are hidden from some queries of a block, and visible to a root in it.
      {1, 1, 470, 16, 16, 100000, 0, 5, false},
      // Working memory that mostly holds the numbers of keys.
      {1, 1, 1500, 16, 16, 30, 0, 0, false},
  };
  for (const auto& options : cases) {
    Problem<T> alone(options), together(options);
    alone.run(1);
    alone.expect_exact();
    together.run(4);
    expect(alone.results() == together.results(), "bits on several threads", 4, 1);
  }
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

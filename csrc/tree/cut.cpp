#include "tree/cut.h"

#include <algorithm>
#include <compare>
#include <deque>

namespace kpig::tree {
namespace {

// What a choice of cuts costs: tokens laid out again behind cuts, then the number of runs.
struct Cost {
  std::int64_t repeated = 0;
  std::int64_t runs = 0;

  auto operator<=>(const Cost&) const = default;
};

}  // namespace

// A run [a, b) lays out its first sequence whole and of every other what it does not share with its predecessor. So a
// cut before a costs order[a].shared tokens, wherever the other cuts are: best[b] = min over a of best[a] + that cost.
// The admissible a form a window whose start never moves back, so a monotone queue finds each minimum in O(1) amortised.
std::vector<std::size_t> cut(std::span<const Place> order, std::int64_t max_tokens) {
  const auto n = order.size();
  std::vector<std::int64_t> fresh(n + 1, 0);
  std::vector<Cost> up_to(n + 1), from(n);
  std::vector<std::size_t> start(n + 1, 0);
  std::deque<std::size_t> window;
  for (std::size_t b = 1; b <= n; ++b) {
    const auto& last = order[b - 1];
    fresh[b] = fresh[b - 1] + last.length() - last.shared;
    from[b - 1] = {up_to[b - 1].repeated + last.shared, up_to[b - 1].runs + 1};
    while (!window.empty() && from[window.back()] > from[b - 1]) window.pop_back();
    window.push_back(b - 1);
    const auto limit = std::max(max_tokens, last.length());
    while (fresh[b] - fresh[window.front()] + order[window.front()].shared > limit) window.pop_front();
    start[b] = window.front();
    up_to[b] = from[window.front()];
  }
  std::vector<std::size_t> cuts{n};
  while (cuts.back() > 0) cuts.push_back(start[cuts.back()]);
  std::ranges::reverse(cuts);
  return cuts;
}

}  // namespace kpig::tree

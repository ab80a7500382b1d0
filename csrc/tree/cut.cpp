#include "tree/cut.h"

#include <algorithm>
#include <deque>

namespace kpig::tree {

// A run [a, b) lays out its first sequence whole and of every other what it does not share with its predecessor. So a
// cut before a repeats order[a].shared tokens wherever the other cuts are, and the fewest that cuts up to b can repeat
// are the minimum over a of cost[a] = (the fewest up to a) + order[a].shared. The admissible a form a window whose
// start never moves back: a monotone queue finds each minimum in O(1) amortised. Its front is the earliest minimum;
// since every part of an admissible run is admissible, taking the earliest also gives the fewest runs.
std::vector<std::size_t> cut(std::span<const Place> order, std::int64_t max_tokens) {
  const auto n = order.size();
  std::vector<std::int64_t> fresh(n + 1, 0), cost(n + 1, 0);
  std::vector<std::size_t> start(n + 1, 0);
  std::deque<std::size_t> window;
  for (std::size_t b = 1; b <= n; ++b) {
    const auto& last = order[b - 1];
    fresh[b] = fresh[b - 1] + last.length() - last.shared;
    while (!window.empty() && cost[window.back()] > cost[b - 1]) window.pop_back();
    window.push_back(b - 1);
    const auto limit = std::max(max_tokens, last.length());
    while (fresh[b] - fresh[window.front()] + order[window.front()].shared > limit) window.pop_front();
    start[b] = window.front();
    if (b < n) cost[b] = cost[start[b]] + order[b].shared;
  }
  std::vector<std::size_t> cuts{n};
  while (cuts.back() > 0) cuts.push_back(start[cuts.back()]);
  std::ranges::reverse(cuts);
  return cuts;
}

}  // namespace kpig::tree

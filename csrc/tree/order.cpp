#include "tree/order.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <utility>

namespace kpig::tree {
namespace {

// Number of leading tokens that a and b share, given that they share the first `depth`.
std::size_t common_prefix(Tokens a, Tokens b, std::size_t depth) {
  constexpr std::size_t kBlock = 16;
  const auto end = std::min(a.size(), b.size());
  while (depth + kBlock <= end && std::memcmp(&a[depth], &b[depth], kBlock * sizeof(a[0])) == 0) depth += kBlock;
  while (depth < end && a[depth] == b[depth]) ++depth;
  return depth;
}

// The unmerged rest of a sorted run; `shared` counts the leading tokens of its front and of the place written last.
struct Rest {
  std::span<const Place> places;
  std::int64_t shared = 0;

  Place take() {
    const Place taken{places.front().sequence, places.front().laid_out, shared};
    places = places.subspan(1);
    if (!places.empty()) shared = places.front().shared;
    return taken;
  }
};

// True if the front of `left` comes first (also if both are equal). Where the decision takes a comparison of tokens,
// the loser's `shared` becomes what it shares with the winner.
bool left_first(Rest& left, Rest& right) {
  if (left.shared != right.shared) return left.shared > right.shared;
  const auto a = left.places.front().laid_out;
  const auto b = right.places.front().laid_out;
  const auto depth = common_prefix(a, b, static_cast<std::size_t>(left.shared));
  const bool first = depth == a.size() || (depth < b.size() && a[depth] < b[depth]);
  (first ? right : left).shared = static_cast<std::int64_t>(depth);
  return first;
}

void merge(Rest left, Rest right, Place* out) {
  while (!left.places.empty() && !right.places.empty()) *out++ = left_first(left, right) ? left.take() : right.take();
  for (auto* rest : {&left, &right}) {
    while (!rest->places.empty()) *out++ = rest->take();
  }
}

}  // namespace

// Merge sort that keeps the shared prefix lengths of neighbours, so that no token is compared twice against the same
// prefix: O(tokens + n log n). Ng and Kakehi, "Merging string sequences by longest common prefixes", 2008.
std::vector<Place> depth_first_order(const Sequences& sequences) {
  std::vector<Place> order;
  for (std::int64_t i = 0; i < sequences.count(); ++i) {
    if (sequences.has_response(i)) order.push_back({i, sequences.laid_out(i), 0});
  }
  std::vector<Place> merged(order.size());
  const auto n = order.size();
  for (std::size_t width = 1; width < n; width *= 2) {
    const std::span<const Place> runs(order);
    for (std::size_t start = 0; start < n; start += 2 * width) {
      const auto middle = std::min(start + width, n);
      const auto end = std::min(middle + width, n);
      merge({runs.subspan(start, middle - start)}, {runs.subspan(middle, end - middle)}, &merged[start]);
    }
    std::swap(order, merged);
  }
  return order;
}

}  // namespace kpig::tree

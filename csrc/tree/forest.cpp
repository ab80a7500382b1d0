#include "tree/forest.h"

#include <numeric>
#include <span>
#include <stdexcept>
#include <string>

#include "tree/cut.h"
#include "tree/order.h"

namespace kpig::tree {
namespace {

Forest lay_out(const Sequences& sequences, std::span<const Place> run) {
  Forest forest;
  // path[d] is the row of the current sequence's token at depth d.
  std::vector<std::int32_t> path;
  const auto close_below = [&](std::size_t depth) {
    const auto end = static_cast<std::int32_t>(forest.input_ids.size());
    for (auto d = depth; d < path.size(); ++d) forest.subtree_end[static_cast<std::size_t>(path[d])] = end;
    path.resize(depth);
  };
  forest.row_offsets.push_back(0);
  for (const auto& place : run) {
    const auto shared = path.empty() ? 0 : static_cast<std::size_t>(place.shared);
    close_below(shared);
    const auto rows = forest.input_ids.size();
    const auto fresh = place.laid_out.subspan(shared);
    forest.input_ids.insert(forest.input_ids.end(), fresh.begin(), fresh.end());
    forest.position_ids.resize(rows + fresh.size());
    std::iota(forest.position_ids.begin() + static_cast<std::ptrdiff_t>(rows), forest.position_ids.end(),
              static_cast<std::int32_t>(shared));
    forest.subtree_end.resize(rows + fresh.size());
    path.resize(place.laid_out.size());
    std::iota(path.begin() + static_cast<std::ptrdiff_t>(shared), path.end(), static_cast<std::int32_t>(rows));
    forest.sequences.push_back(place.sequence);
    forest.rows.insert(forest.rows.end(), path.begin() + sequences.start_of_response(place.sequence) - 1, path.end());
    forest.row_offsets.push_back(std::ssize(forest.rows));
  }
  close_below(0);
  return forest;
}

}  // namespace

std::vector<Forest> pack(const Sequences& sequences, std::int64_t max_tokens) {
  if (max_tokens < 1 || max_tokens > kMaxRows) {
    throw std::invalid_argument("max_tokens = " + std::to_string(max_tokens) + "; give a tree between 1 and " +
                                std::to_string(kMaxRows) + " tokens");
  }
  check(sequences);
  const auto order = depth_first_order(sequences);
  const auto cuts = cut(order, max_tokens);
  std::vector<Forest> forests;
  for (std::size_t run = 0; run + 1 < cuts.size(); ++run) {
    forests.push_back(lay_out(sequences, std::span(order).subspan(cuts[run], cuts[run + 1] - cuts[run])));
  }
  return forests;
}

}  // namespace kpig::tree

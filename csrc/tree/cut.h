// Where the depth-first order is cut into forests.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tree/order.h"

namespace kpig::tree {

// Boundaries of consecutive runs of `order`: run r is [cuts[r], cuts[r + 1]). A run lays out at most max_tokens tokens
// or is one path: a sequence that alone exceeds max_tokens, with the prefixes and copies of it, which cost nothing.
// The total of laid-out tokens is minimal, then the number of runs.
std::vector<std::size_t> cut(std::span<const Place> order, std::int64_t max_tokens);

}  // namespace kpig::tree

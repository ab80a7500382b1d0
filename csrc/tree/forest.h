// Sequences in, forests of tries out: the flat arrays that tree attention works on.
#pragma once

#include <cstdint>
#include <vector>

#include "tree/sequences.h"

namespace kpig::tree {

// Row q may attend to row k if and only if k <= q < subtree_end[k].
struct Forest {
  // One value per row, in depth-first order; position_ids is the depth.
  std::vector<std::int32_t> input_ids, position_ids, subtree_end;
  // The sequences served; rows[row_offsets[j] .. row_offsets[j + 1]) predict the response of sequences[j], in order.
  std::vector<std::int64_t> sequences, rows, row_offsets;
};

// Lays out every sequence that has a response in exactly one forest, cut as `cut` says. Throws std::invalid_argument
// where `check` does and for max_tokens outside 1 ... kMaxRows.
std::vector<Forest> pack(const Sequences& sequences, std::int64_t max_tokens);

}  // namespace kpig::tree

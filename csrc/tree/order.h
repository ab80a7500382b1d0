// Depth-first order of the trie of sequences, without building the trie.
#pragma once

#include <cstdint>
#include <vector>

#include "tree/sequences.h"

namespace kpig::tree {

// A place in the order: a sequence, what it needs laid out, and how many leading tokens the place before shares.
struct Place {
  std::int64_t sequence;
  Tokens laid_out;
  std::int64_t shared;

  std::int64_t length() const { return std::ssize(laid_out); }
};

// The sequences that have a response, sorted lexicographically by what they need laid out, equal ones by index.
std::vector<Place> depth_first_order(const Sequences& sequences);

}  // namespace kpig::tree

// The input of the tree builder: token sequences, each a prompt followed by a response.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

namespace kpig::tree {

// Rows of a tree are numbered in int32.
inline constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max();

using Tokens = std::span<const std::int32_t>;

// Sequence i is tokens[offsets[i] .. offsets[i + 1]); its response starts at index response_start[i] of the sequence
// (the sequence's length for an empty response).
struct Sequences {
  Tokens tokens;
  std::span<const std::int64_t> offsets;
  std::span<const std::int64_t> response_start;

  std::int64_t count() const { return std::ssize(response_start); }

  std::int64_t length(std::int64_t i) const { return offsets[static_cast<std::size_t>(i) + 1] - begin(i); }

  std::int64_t start_of_response(std::int64_t i) const { return response_start[static_cast<std::size_t>(i)]; }

  bool has_response(std::int64_t i) const { return start_of_response(i) < length(i); }

  // What a sequence with a response needs laid out: all but its last token, which is predicted and never predicts.
  Tokens laid_out(std::int64_t i) const {
    return tokens.subspan(static_cast<std::size_t>(begin(i)), static_cast<std::size_t>(length(i) - 1));
  }

 private:
  std::int64_t begin(std::int64_t i) const { return offsets[static_cast<std::size_t>(i)]; }
};

// Throws std::invalid_argument, naming the value and the fix, unless every other function may rely on `sequences`.
void check(const Sequences& sequences);

}  // namespace kpig::tree

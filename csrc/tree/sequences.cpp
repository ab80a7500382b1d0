#include "tree/sequences.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace kpig::tree {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string element(const char* array, std::int64_t index, std::int64_t value) {
  return std::string(array) + "[" + std::to_string(index) + "] = " + std::to_string(value);
}

void check_offsets(const Sequences& s) {
  const auto needed = s.count() + 1;
  if (std::ssize(s.offsets) != needed) {
    fail("offsets has " + std::to_string(s.offsets.size()) + " values, but response_start has " +
         std::to_string(s.count()) + "; give one more offset than sequences");
  }
  if (s.offsets.front() != 0) fail(element("offsets", 0, s.offsets.front()) + "; the first offset must be 0");
  for (std::int64_t i = 0; i < s.count(); ++i) {
    const auto end = s.offsets[static_cast<std::size_t>(i) + 1];
    if (end < s.offsets[static_cast<std::size_t>(i)]) {
      fail(element("offsets", i + 1, end) + " makes the length of sequence " + std::to_string(i) +
           " negative; offsets must not decrease");
    }
  }
  if (s.offsets.back() != std::ssize(s.tokens)) {
    fail(element("offsets", s.count(), s.offsets.back()) + ", but there are " + std::to_string(s.tokens.size()) +
         " tokens; the last offset must be the number of tokens");
  }
}

void check_responses(const Sequences& s) {
  for (std::int64_t i = 0; i < s.count(); ++i) {
    const auto start = s.start_of_response(i);
    const auto length = s.length(i);
    if (start < 0 || start > length) {
      fail(element("response_start", i, start) + " lies outside sequence " + std::to_string(i) + " of " +
           std::to_string(length) + " tokens; it must be the index of the first response token, or " +
           std::to_string(length) + " for an empty response");
    }
    if (start == 0 && length > 0) {
      fail(element("response_start", i, start) + " leaves no prompt token to predict the first response token from; " +
           "put at least one token (such as BOS) before the response");
    }
    if (length - 1 > kMaxRows) {
      fail("sequence " + std::to_string(i) + " has " + std::to_string(length) + " tokens, more than a tree of " +
           std::to_string(kMaxRows) + " rows can hold; shorten it");
    }
  }
}

void check_tokens(const Sequences& s) {
  std::int32_t signs = 0;
  for (const auto token : s.tokens) signs |= token;
  if (signs >= 0) return;
  const auto at = std::ranges::find_if(s.tokens, [](std::int32_t token) { return token < 0; }) - s.tokens.begin();
  fail(element("tokens", at, s.tokens[static_cast<std::size_t>(at)]) + "; token ids must not be negative");
}

}  // namespace

void check(const Sequences& sequences) {
  check_offsets(sequences);
  check_responses(sequences);
  check_tokens(sequences);
}

}  // namespace kpig::tree

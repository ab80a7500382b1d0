// How the columns of a row are shared out over the thread blocks of a cluster, and how many blocks a row needs.
//
// V columns; a block holds its slice of each of a row's `sides` (one, or model and reference) in shared memory.
#pragma once

#include <cstdint>

#include "rowmath/elementary.hpp"

namespace kpig::cuda {

// Columns that a thread moves at once: 16 bytes of float32.
inline constexpr int kLanes = 4;
// Slices start at multiples of this many columns, 128 bytes of float32: no two blocks write to one cache line of it.
inline constexpr int kAlignment = 32;
// The most blocks of a cluster on every GPU that has clusters.
inline constexpr int kLargestCluster = 8;
// Threads of a block.
inline constexpr int kThreads = 512;
// Blocks that a multiprocessor should hold at a time: one computes while the other waits for memory.
inline constexpr int kBlocksAtOnce = 2;
// Bytes of shared memory that reductions take at most, and that the GPU takes for itself, for each block.
inline constexpr std::int64_t kReductionBytes = 1024, kSystemBytes = 1024;

struct Slice {
  std::int64_t begin;
  int columns;
};

// Of every slice but the last ones, which may have fewer columns or none.
KPIG_ROWMATH std::int64_t slice_columns(std::int64_t columns, int blocks) {
  const auto share = (columns + blocks - 1) / blocks;
  return (share + kAlignment - 1) / kAlignment * kAlignment;
}

KPIG_ROWMATH Slice slice_of(std::int64_t columns, int blocks, int rank) {
  const auto size = slice_columns(columns, blocks);
  const auto begin = rowmath::minimum<std::int64_t>(rank * size, columns);
  return {begin, static_cast<int>(rowmath::minimum<std::int64_t>(size, columns - begin))};
}

// Where a block's slice of the second side begins in its shared memory, in vectors.
KPIG_ROWMATH std::int64_t slice_vectors(std::int64_t columns, int blocks) {
  return slice_columns(columns, blocks) / kLanes;
}

// Shared memory of a block for its slices.
inline std::int64_t slice_bytes(std::int64_t columns, int sides, int blocks) {
  return sides * slice_columns(columns, blocks) * static_cast<std::int64_t>(sizeof(float));
}

// The fewest blocks of which a multiprocessor holds kBlocksAtOnce; else the most, if the `shared_memory` bytes that a
// block may use suffice; else 0.
inline int cluster_size(std::int64_t columns, int sides, std::int64_t shared_memory) {
  const auto share = (shared_memory + kSystemBytes) / kBlocksAtOnce - kSystemBytes;
  int blocks = 1;
  while (blocks < kLargestCluster && slice_bytes(columns, sides, blocks) + kReductionBytes > share) blocks *= 2;
  return slice_bytes(columns, sides, blocks) + kReductionBytes <= shared_memory ? blocks : 0;
}

}  // namespace kpig::cuda

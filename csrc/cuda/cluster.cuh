// Reductions over all threads of a cluster, in an order that never changes: the lanes of a warp and the warps of a
// block as trees, the blocks by rank. In double: they are few.
#pragma once

#include <cooperative_groups.h>

#include "cuda/phases.hpp"

namespace kpig::cuda {

namespace groups = cooperative_groups;

inline constexpr int kWarp = 32, kWarps = kThreads / kWarp;
static_assert(kWarps <= kWarp, "one warp reduces what the warps have found");

struct Largest {
  static constexpr double kNeutral = kNone;
  __device__ static double of(double x, double y) { return rowmath::maximum(x, y); }
};

struct Sum {
  static constexpr double kNeutral = 0;
  __device__ static double of(double x, double y) { return x + y; }
};

// Blocks leave what they have found for the others: a place for each reduction, so that none waits for readers.
template <int kSides, int kReductions>
struct Found {
  Each<kSides> warp[kWarps], block[kReductions];
};

// In lane 0.
template <class Combine, int kSides>
__device__ Each<kSides> over_warp(Each<kSides> x) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    for (double& side : x.side) side = Combine::of(side, __shfl_down_sync(~0u, side, step));
  }
  return x;
}

// In every thread of the cluster, which all must call it; what they wrote to shared memory before is visible after.
template <class Combine, int kSides, int kReductions>
__device__ Each<kSides> over_cluster(Each<kSides> x, Found<kSides, kReductions>& found, int reduction) {
  const auto cluster = groups::this_cluster();
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  x = over_warp<Combine>(x);
  if (lane == 0) found.warp[warp] = x;
  __syncthreads();
  if (warp == 0) {
    for (int side = 0; side < kSides; ++side) {
      x.side[side] = lane < kWarps ? found.warp[lane].side[side] : Combine::kNeutral;
    }
    x = over_warp<Combine>(x);
    if (lane == 0) found.block[reduction] = x;
  }
  // Also before the next reduction overwrites found.warp.
  cluster.sync();
  for (double& side : x.side) side = Combine::kNeutral;
  for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) {
    const Each<kSides> other = *cluster.map_shared_rank(&found.block[reduction], rank);
    for (int side = 0; side < kSides; ++side) x.side[side] = Combine::of(x.side[side], other.side[side]);
  }
  return x;
}

}  // namespace kpig::cuda

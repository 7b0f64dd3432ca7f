// Sums over the lanes of a warp, by all of them together.
#pragma once

#include "cuda/platform.cuh"

namespace skvq::cuda {

SKVQ_DEVICE int sum_lanes(int x) {
  for (int distance = 1; distance < kWarp; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
// Of this lane and those before it.
SKVQ_DEVICE int inclusive_scan(int x) {
  const int lane = lane_index();
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int lower = __shfl_up_sync(kAllLanes, x, distance);
    x += lane >= distance ? lower : 0;
  }
  return x;
}

}  // namespace skvq::cuda

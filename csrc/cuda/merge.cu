// Two partial attention results of the same queries into one.
#include "core/softmax.h"
#include "cuda/launch.cuh"

namespace skvq::cuda {
namespace {

constexpr int kThreads = 256;

// A warp for each row.
__global__ void __launch_bounds__(kThreads) merge_rows(const __grid_constant__ MergeArgs a) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_index();
  if (row >= a.rows) return;
  const float lse_a = a.lse_a[row], lse_b = a.lse_b[row];
  const MergeWeights w =
      merge({lse_a, lse_a == minus_infinity() ? 0.0f : 1.0f}, {lse_b, lse_b == minus_infinity() ? 0.0f : 1.0f});
  const float norm = normalizer(w.merged);
  for (int c = lane_index(); c < a.head_dim; c += kWarp) {
    const std::int64_t i = row * a.head_dim + c;
    const float o = load_float(a.dtype, a.out_a, i) * w.a + load_float(a.dtype, a.out_b, i) * w.b;
    store_float(a.dtype, a.out, i, o * norm);
  }
  if (lane_index() == 0) a.lse[row] = log_sum_exp(w.merged);
}

}  // namespace

void merge_states(const MergeArgs& a, Stream stream) {
  constexpr int kRowsPerBlock = kThreads / kWarp;
  launch("merge_rows", merge_rows, {(a.rows + kRowsPerBlock - 1) / kRowsPerBlock}, kThreads, 0, stream, a);
}

}  // namespace skvq::cuda

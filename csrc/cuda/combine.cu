// The slots of all segments of a query row become its output.
#include "cuda/combine.cuh"
#include "cuda/launch.cuh"
#include "cuda/schedule.cuh"

namespace skvq::cuda {
namespace {

constexpr int kCombineWarps = 4;
constexpr int kLaneChannels = 256 / kWarp;  // at most, of the head_dims that are built

struct CombineShared {
  float out[kCombineWarps][kLaneChannels * kWarp];
  SoftmaxState states[kCombineWarps];
};

SKVQ_DEVICE int sequence_of(const Ragged& queries, std::int64_t token) {
  if (queries.cu_seqlens == nullptr) return static_cast<int>(token / (queries.num_tokens / queries.batch));
  int low = 0, high = queries.batch - 1;  // the last sequence that begins at or before the token
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (queries.begin(middle) <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

struct Slots {
  std::int64_t first;  // index of the row in the first slot
  int count;
};
SKVQ_DEVICE Slots slots_of(const DecodeParams& p, int sequence, int head, int row) {
  const int total = total_cost(p);
  const Item item = item_of_row(p, sequence, head, row);
  if (item.begin == item.end) return {0, 0};
  const int share = cost_per_block(p, total), first = item.begin / share, last = (item.end - 1) / share;
  return {static_cast<std::int64_t>(item.index + first) * p.slot_columns + row % p.group_columns, last - first + 1};
}

// One block a row; warps take slots in turn.
__global__ void __launch_bounds__(kCombineWarps* kWarp) combine_kernel(const DecodeParams p) {
  SKVQ_SHARED(CombineShared, shared);
  const DecodeArgs& a = p.args;
  const int head_dim = a.cache.head_dim, ratio = a.num_q_heads / a.cache.num_kv_heads;
  const int lane = lane_index(), warp = warp_index(), q_head = static_cast<int>(blockIdx.y);
  const std::int64_t token = blockIdx.x;
  const int sequence = sequence_of(a.queries, token);
  const int row = static_cast<int>(token - a.queries.begin(sequence)) * ratio + q_head % ratio;
  const Slots slots = slots_of(p, sequence, q_head / ratio, row);
  SoftmaxState total = empty_state();
  float out[kLaneChannels] = {};
  for (int i = warp; i < slots.count; i += kCombineWarps) {
    const std::int64_t slot = slots.first + static_cast<std::int64_t>(i) * p.slot_columns;
    const MergeWeights w = merge(total, p.states[slot]);
    const float* part = p.partial + slot * head_dim;
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) {
      const int channel = j * kWarp + lane;
      if (channel < head_dim) out[j] = out[j] * w.a + part[channel] * w.b;
    }
    total = w.merged;
  }
#pragma unroll
  for (int j = 0; j < kLaneChannels; ++j) shared.out[warp][j * kWarp + lane] = out[j];
  if (lane == 0) shared.states[warp] = total;
  __syncthreads();
  const std::int64_t out_row = token * a.num_q_heads + q_head;
  for (int channel = threadIdx.x; channel < head_dim; channel += kCombineWarps * kWarp) {
    // A learned sink is one more logit whose value is zero.
    SoftmaxState all = a.learned_sinks ? SoftmaxState{a.learned_sinks[q_head], 1.0f} : empty_state();
    float o = 0.0f;
    for (int w = 0; w < kCombineWarps; ++w) {
      const MergeWeights weights = merge(all, shared.states[w]);
      o = o * weights.a + shared.out[w][channel] * weights.b;
      all = weights.merged;
    }
    store_float(a.q_dtype, a.out, out_row * head_dim + channel, o * normalizer(all));
    if (channel == 0) a.lse[out_row] = log_sum_exp(all);
  }
}

}  // namespace

void combine(const DecodeParams& params, Stream stream) {
  launch("combine_kernel", combine_kernel, {params.args.queries.num_tokens, params.args.num_q_heads},
         kCombineWarps * kWarp, 0, stream, params);
}

}  // namespace skvq::cuda

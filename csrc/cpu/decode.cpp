#include <algorithm>
#include <vector>

#include "core/window.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace skvq::cpu {
namespace {

// Items that share rows follow each other; the first of them covers sinks and window.
struct RowBlockItems {
  std::size_t first, count;
};

void plan_sequence(const DecodeArgs& a, int sequence, std::vector<WorkItem>& items,
                   std::vector<RowBlockItems>& blocks) {
  const CacheView& c = a.cache;
  const int rows = a.queries.length(sequence) * (a.num_q_heads / c.num_kv_heads);
  const int tiles = packed_tiles(c.kv_len[sequence], c.num_sinks, c.window);
  const int blocks_of_rows = (rows + kRowsPerItem - 1) / kRowsPerItem;
  const int wanted = max_int(1, kItemsPerSequence / max_int(1, c.num_kv_heads * blocks_of_rows));
  const int tiles_per_item = max_int(kFewestTiles, (tiles + wanted - 1) / wanted);
  const int parts = max_int(1, (tiles + tiles_per_item - 1) / tiles_per_item);
  for (int head = 0; head < c.num_kv_heads; ++head) {
    for (int row = 0; row < rows; row += kRowsPerItem) {
      blocks.push_back({items.size(), static_cast<std::size_t>(parts)});
      for (int part = 0; part < parts; ++part) {
        const int begin = part * tiles_per_item;
        items.push_back({sequence, head, row, min_int(kRowsPerItem, rows - row), part == 0, begin,
                         min_int(begin + tiles_per_item, tiles), nullptr, nullptr});
      }
    }
  }
}

// Four rows pass over a tile of 64 tokens at a time.
std::int64_t item_ns(const WorkItem& item, int head_dim) {
  const int tiles = item.tile_end - item.tile_begin + (item.full_precision ? 4 : 0);
  return static_cast<std::int64_t>((item.rows + 3) / 4) * tiles * head_dim * 8;
}

void combine(const DecodeArgs& a, const WorkItem* items, std::size_t count) {
  const CacheView& c = a.cache;
  const int ratio = a.num_q_heads / c.num_kv_heads;
  for (int r = 0; r < items[0].rows; ++r) {
    const int row = items[0].first_row + r, q_head = items[0].head * ratio + row % ratio;
    const std::int64_t token = a.queries.begin(items[0].sequence) + row / ratio;
    // A learned sink is one more logit whose value is zero.
    SoftmaxState total = a.learned_sinks ? SoftmaxState{a.learned_sinks[q_head], 1.0f} : empty_state();
    float o[kMaxHeadDim] = {};
    for (std::size_t i = 0; i < count; ++i) {
      const MergeWeights w = merge(total, items[i].state[r]);
      const float* part = items[i].partial + r * c.head_dim;
      for (int ch = 0; ch < c.head_dim; ++ch) o[ch] = o[ch] * w.a + part[ch] * w.b;
      total = w.merged;
    }
    const std::int64_t out_row = token * a.num_q_heads + q_head;
    const float norm = normalizer(total);
    for (int ch = 0; ch < c.head_dim; ++ch) store_float(a.q_dtype, a.out, out_row * c.head_dim + ch, o[ch] * norm);
    a.lse[out_row] = log_sum_exp(total);
  }
}

}  // namespace

void decode_attention(const DecodeArgs& a, const Parallel& parallel) {
  const CacheView& c = a.cache;
  std::vector<WorkItem> items;
  std::vector<RowBlockItems> blocks;
  for (int b = 0; b < c.batch; ++b) plan_sequence(a, b, items, blocks);

  std::size_t rows = 0;
  for (const WorkItem& item : items) rows += item.rows;
  const Aligned<float> partials = aligned<float>(rows * c.head_dim);
  std::vector<SoftmaxState> states(rows);
  std::size_t next = 0;
  for (WorkItem& item : items) {
    item.partial = partials.get() + next * c.head_dim;
    item.state = states.data() + next;
    next += item.rows;
  }

  const AttendKernels& attend = kernels().attend;
  std::int64_t ns = 0;
  for (const WorkItem& item : items) ns += item_ns(item, c.head_dim);
  const std::int64_t count = static_cast<std::int64_t>(items.size());
  for_each(parallel, count, ns / std::max<std::int64_t>(1, count), [&](std::int64_t i) {
    Scratch scratch = scratch_for(c, attend.tile_bytes);
    attend.attend_item(a, items[i], scratch);
  });
  const std::int64_t block_count = static_cast<std::int64_t>(blocks.size());
  const std::int64_t merge_ns =
      static_cast<std::int64_t>(rows) * c.head_dim / 4 / std::max<std::int64_t>(1, block_count);
  for_each(parallel, block_count, merge_ns,
           [&](std::int64_t i) { combine(a, &items[blocks[i].first], blocks[i].count); });
}

void merge_states(const MergeArgs& a, const Parallel& parallel) {
  for_each(parallel, a.rows, a.head_dim, [&](std::int64_t row) {
    const MergeWeights w = merge({a.lse_a[row], a.lse_a[row] == minus_infinity() ? 0.0f : 1.0f},
                                 {a.lse_b[row], a.lse_b[row] == minus_infinity() ? 0.0f : 1.0f});
    const float norm = normalizer(w.merged);
    for (std::int64_t i = row * a.head_dim; i < (row + 1) * a.head_dim; ++i) {
      const float o = load_float(a.dtype, a.out_a, i) * w.a + load_float(a.dtype, a.out_b, i) * w.b;
      store_float(a.dtype, a.out, i, o * norm);
    }
    a.lse[row] = log_sum_exp(w.merged);
  });
}

}  // namespace skvq::cpu

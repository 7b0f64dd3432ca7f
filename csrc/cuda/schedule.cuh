// Who does what in decode attention, computed on the device from the lengths: nothing is read on the host.
//
// An *item* is one KV head of one sequence for up to `group_columns` query rows. Its work is a line of steps of 16
// tokens of sinks and window, then packed tiles. The lines of all items in a row are cut into equal shares, one for
// each block. A block's share of one item is a *segment*; it leaves a partial softmax state in slot item + block, which
// no other segment has, because from one segment to the next at least one of the two grows.
#pragma once

#include "core/window.h"
#include "cuda/decode_params.cuh"
#include "cuda/lanes.cuh"

namespace skvq::cuda {

// The queries of one sequence and the tokens that at least one of them reads.
struct SequenceWork {
  int columns;         // query rows that share a KV head
  int first_position;  // of the first query
  int tile_begin, tile_end;
  TokenRange sinks, window;  // positions of rows in full precision

  SKVQ_DEVICE static int steps_of(TokenRange r) {
    return r.end > r.begin ? (r.end - r.begin + kStepTokens - 1) / kStepTokens : 0;
  }
  SKVQ_DEVICE int steps() const { return steps_of(sinks) + steps_of(window); }
  // Cost of one item for one warp's worth of columns.
  SKVQ_DEVICE int line() const { return steps() * kStepCost + max_int(0, tile_end - tile_begin); }
  SKVQ_DEVICE int groups(int group_columns) const { return (columns + group_columns - 1) / group_columns; }
};

// Warps that work side by side on the columns of a group: 1, 2 or 4.
SKVQ_DEVICE int column_warps(int columns) {
  return columns <= kColumns ? 1 : columns <= 2 * kColumns ? 2 : 4;
}

SKVQ_DEVICE SequenceWork work_of(const DecodeArgs& a, int sequence) {
  const CacheView& c = a.cache;
  SequenceWork w{};
  const int q_len = a.queries.length(sequence), kv_len = c.kv_len[sequence];
  w.columns = q_len * (a.num_q_heads / c.num_kv_heads);
  w.first_position = a.queries_in_cache ? kv_len - q_len : kv_len;
  if (q_len <= 0) return w;
  const int last = w.first_position + q_len - 1;
  const TokenRange first_seen = visible(w.first_position, kv_len, a.sliding_window);
  const TokenRange last_seen = visible(last, kv_len, a.sliding_window);
  const int first_packed = packed_end(c, w.first_position, kv_len), last_packed = packed_end(c, last, kv_len);
  w.tile_begin = max_int(0, first_seen.begin - c.num_sinks) / kTileTokens;
  const int packed = min_int(last_seen.end, last_packed) - c.num_sinks;
  w.tile_end = packed > 0 ? min_int((packed + kTileTokens - 1) / kTileTokens, c.max_pages) : 0;
  w.sinks = {first_seen.begin, min_int(c.num_sinks, last_seen.end)};
  w.window = {max_int(first_packed, first_seen.begin), last_seen.end};
  return w;
}

// Warps that all groups of columns of one head take; what a group costs grows with the warps that it takes from the
// tiles. All groups but the last are whole.
SKVQ_DEVICE int warps_of_head(const DecodeParams& p, const SequenceWork& w) {
  const int whole = w.columns / p.group_columns, rest = w.columns % p.group_columns;
  return whole * column_warps(p.group_columns) + (rest > 0 ? column_warps(rest) : 0);
}
// Of all items of a sequence.
SKVQ_DEVICE int cost_of(const DecodeParams& p, const SequenceWork& w) {
  return p.args.cache.num_kv_heads * warps_of_head(p, w) * w.line();
}

// By all lanes of a warp together.
SKVQ_DEVICE int total_cost(const DecodeParams& p) {
  int cost = 0;
  for (int b = lane_index(); b < p.args.cache.batch; b += kWarp) cost += cost_of(p, work_of(p.args, b));
  return sum_lanes(cost);
}
SKVQ_DEVICE int cost_per_block(const DecodeParams& p, int total) {
  return max_int(kMinBlockCost, (total + p.blocks - 1) / p.blocks);
}

struct Item {
  int sequence, head, group;
  int index;       // among all items, those without work too
  int begin, end;  // on the line of all items
  int warps;       // column_warps of its columns
  SequenceWork work;
};

// The item of a head and group of a sequence whose items begin with number `index` and at `begin` on the line of all.
SKVQ_DEVICE Item item_of(const DecodeParams& p, const SequenceWork& w, int sequence, int head, int group, int index,
                         int begin) {
  const int whole = column_warps(p.group_columns), line = w.line(), groups = w.groups(p.group_columns);
  const int first = begin + line * (head * warps_of_head(p, w) + group * whole);
  const int warps = column_warps(min_int(p.group_columns, w.columns - group * p.group_columns));
  return {sequence, head, group, index + head * groups + group, first, first + line * warps, warps, w};
}

// The item that covers `at` on the line of all; by all lanes of a warp together. `at` must be below the total.
SKVQ_DEVICE Item find_item(const DecodeParams& p, int at) {
  const CacheView& c = p.args.cache;
  int begin = 0, index = 0;
  for (int first = 0; first < c.batch; first += kWarp) {
    const int b = first + lane_index();
    SequenceWork w{};
    if (b < c.batch) w = work_of(p.args, b);
    const int own_cost = cost_of(p, w), own_items = w.groups(p.group_columns) * c.num_kv_heads;
    const int cost = inclusive_scan(own_cost), items = inclusive_scan(own_items);
    const unsigned beyond = __ballot_sync(kAllLanes, begin + cost > at);
    if (beyond != 0) {
      const int lane = __ffs(static_cast<int>(beyond)) - 1, sequence = first + lane;
      begin += __shfl_sync(kAllLanes, cost - own_cost, lane);
      index += __shfl_sync(kAllLanes, items - own_items, lane);
      const SequenceWork found = work_of(p.args, sequence);
      const int local = (at - begin) / found.line(), per_head = warps_of_head(p, found);
      const int group = min_int(local % per_head / column_warps(p.group_columns), found.groups(p.group_columns) - 1);
      return item_of(p, found, sequence, local / per_head, group, index, begin);
    }
    begin += __shfl_sync(kAllLanes, cost, kWarp - 1);
    index += __shfl_sync(kAllLanes, items, kWarp - 1);
  }
  return {};
}

// The item of one query row; by all lanes of a warp together.
SKVQ_DEVICE Item item_of_row(const DecodeParams& p, int sequence, int head, int row) {
  const CacheView& c = p.args.cache;
  int begin = 0, index = 0;
  for (int b = lane_index(); b < sequence; b += kWarp) {
    const SequenceWork w = work_of(p.args, b);
    begin += cost_of(p, w);
    index += w.groups(p.group_columns) * c.num_kv_heads;
  }
  return item_of(p, work_of(p.args, sequence), sequence, head, row / p.group_columns, sum_lanes(index),
                 sum_lanes(begin));
}

}  // namespace skvq::cuda

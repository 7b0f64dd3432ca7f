// Who does what in decode attention, computed on the device from the lengths: nothing is read on the host.
//
// An *item* is one KV head of one sequence for up to `group_columns` query rows. Its work is a line of steps of 16
// tokens of sinks and window, then packed tiles. The lines of all items in a row are cut into equal shares, one for
// each block. A block's share of one item is a *segment*; it leaves a partial softmax state in slot item + block, which
// no other segment has, because from one segment to the next at least one of the two grows.
#pragma once

#include "core/window.h"
#include "cuda/decode_params.cuh"

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

// Cost of all items of a sequence; what a group of columns costs grows with the warps that it takes from the tiles.
SKVQ_DEVICE int cost_of(const DecodeParams& p, const SequenceWork& w) {
  const int whole = w.columns / p.group_columns, rest = w.columns % p.group_columns;
  const int warps = whole * column_warps(p.group_columns) + (rest > 0 ? column_warps(rest) : 0);
  return p.args.cache.num_kv_heads * warps * w.line();
}

SKVQ_DEVICE int sum_lanes(int x) {
  for (int distance = 1; distance < kWarp; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
SKVQ_DEVICE int inclusive_scan(int x) {
  const int lane = lane_index();
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int lower = __shfl_up_sync(kAllLanes, x, distance);
    x += lane >= distance ? lower : 0;
  }
  return x;
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

// Item `local` of a sequence whose items begin at `index` and whose line begins at `begin`.
SKVQ_DEVICE Item item_of(const DecodeParams& p, int sequence, int head, int group, int index, int begin) {
  const SequenceWork w = work_of(p.args, sequence);
  const int groups = w.groups(p.group_columns), line = w.line(), last = groups - 1;
  const int whole = column_warps(p.group_columns), rest = column_warps(w.columns - last * p.group_columns);
  Item item{sequence, head, group, index + head * groups + group, 0, 0, group == last ? rest : whole, w};
  item.begin = begin + line * (head * (last * whole + rest) + group * whole);
  item.end = item.begin + line * item.warps;
  return item;
}

// The item that covers `at` on the line of all; by all lanes of a warp together. `at` must be below the total.
SKVQ_DEVICE Item find_item(const DecodeParams& p, int at) {
  const CacheView& c = p.args.cache;
  int begin = 0, index = 0;
  for (int first = 0; first < c.batch; first += kWarp) {
    const int b = first + lane_index();
    SequenceWork w{};
    if (b < c.batch) w = work_of(p.args, b);
    const int cost = inclusive_scan(cost_of(p, w)), items = inclusive_scan(w.groups(p.group_columns) * c.num_kv_heads);
    const unsigned beyond = __ballot_sync(kAllLanes, begin + cost > at);
    if (beyond != 0) {
      const int lane = __ffs(static_cast<int>(beyond)) - 1;
      const int before = __shfl_sync(kAllLanes, cost, max_int(0, lane - 1));
      const int items_before = __shfl_sync(kAllLanes, items, max_int(0, lane - 1));
      begin += lane > 0 ? before : 0;
      index += lane > 0 ? items_before : 0;
      const int sequence = first + lane;
      const SequenceWork found = work_of(p.args, sequence);
      const int groups = found.groups(p.group_columns), line = found.line();
      const int whole = column_warps(p.group_columns);
      const int rest = column_warps(found.columns - (groups - 1) * p.group_columns);
      const int local = (at - begin) / line, per_head = (groups - 1) * whole + rest;
      return item_of(p, sequence, local / per_head, min_int(local % per_head / whole, groups - 1), index, begin);
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
  return item_of(p, sequence, head, row / p.group_columns, sum_lanes(index), sum_lanes(begin));
}

}  // namespace skvq::cuda

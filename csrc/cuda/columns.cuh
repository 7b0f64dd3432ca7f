// The query rows of a warp: which they are, what each may see, and where its numbers come from.
#pragma once

#include "cuda/schedule.cuh"
#include "cuda/sums.cuh"

namespace skvq::cuda {

// Row r of an item is query r / ratio and query head r % ratio of its KV head; a warp has rows first to
// first + count - 1, at most kColumns.
struct ColumnSpan {
  int first, count;
};

// What one column may see, in shared memory because only tiles at a border ask.
struct ColumnView {
  int begin, end;  // positions
  int packed_end;  // first position that it reads in full precision after the sinks
  float shift;     // added to its logits
};

SKVQ_DEVICE ColumnSpan span_of(const DecodeParams& p, const Item& item, int column_warp) {
  const int first = item.group * p.group_columns + column_warp * kColumns;
  return {first, max_int(0, min_int(kColumns, item.work.columns - first))};
}

struct QueryRow {
  std::int64_t token;
  int head, query;
};
SKVQ_DEVICE QueryRow query_row(const DecodeArgs& a, const Item& item, int row) {
  const int ratio = a.num_q_heads / a.cache.num_kv_heads, query = row / ratio;
  return {a.queries.begin(item.sequence) + query, item.head * ratio + row % ratio, query};
}

SKVQ_DEVICE ColumnView view_of(const DecodeArgs& a, const Item& item, int row) {
  const int kv_len = a.cache.kv_len[item.sequence];
  const QueryRow q = query_row(a, item, row);
  const int position = item.work.first_position + q.query;
  const TokenRange seen = visible(position, kv_len, a.sliding_window);
  const float shift = a.logit_shift ? a.logit_shift[q.token * a.num_q_heads + q.head] : 0.0f;
  return {seen.begin, seen.end, packed_end(a.cache, position, kv_len), shift};
}

// Tiles that all columns of a span see whole: [begin, end).
SKVQ_DEVICE TokenRange plain_tiles(const CacheView& c, const ColumnView& first, const ColumnView& last) {
  const int begin = max_int(0, last.begin - c.num_sinks), end = min_int(first.end, first.packed_end) - c.num_sinks;
  return {(begin + kTileTokens - 1) / kTileTokens, max_int(0, end) / kTileTokens};
}

// Logit shift and softcap, on a logit in units of log 2.
SKVQ_DEVICE float transform_logit(const DecodeArgs& a, float logit, float shift) {
  float natural = logit * kLn2 + shift;
  if (a.softcap > 0.0f) natural = a.softcap * tanhf(natural / a.softcap);
  return natural * kLog2e;
}
SKVQ_DEVICE bool transforms_logits(const DecodeArgs& a) {
  return a.softcap > 0.0f || a.logit_shift != nullptr;
}

// Two neighbouring channels of the query of lane l's column, l / 4, as they lie in memory; 0 for columns that are not.
struct QueryReader {
  const unsigned char* row;  // null where there is no such column

  SKVQ_DEVICE QueryReader(const DecodeArgs& a, const Item& item, ColumnSpan span) : row(nullptr) {
    const int column = lane_index() / 4;
    if (column >= span.count) return;
    const QueryRow q = query_row(a, item, span.first + column);
    row = static_cast<const unsigned char*>(a.q.data) + (q.token * a.q.token_stride + q.head * a.q.head_stride) * 2;
  }
  SKVQ_DEVICE std::uint32_t pair(int channel) const {
    return row == nullptr ? 0u : *reinterpret_cast<const std::uint32_t*>(row + channel * 2);
  }
};

}  // namespace skvq::cuda

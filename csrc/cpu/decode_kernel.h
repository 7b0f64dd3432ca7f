// Decode attention: one softmax over sinks, packed pages and window.
//
// Work is cut into items of (sequence, KV head, rows, segment part); each leaves a partial softmax state that
// `combine` merges in a fixed order. How it is cut depends on the shapes of the one sequence only, so results do
// not change with the number of threads or with what else is in the batch.
#pragma once

#include "cpu/exact_kernel.h"
#include "cpu/integer_kernel.h"
#include "cpu/repack_kernel.h"
#include "cpu/row_kernel.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

enum class Segment { kSinks, kPages, kWindow };

// Tokens of a tile that a row reads from this segment, as [begin, end) inside the tile.
inline TokenRange tile_range(const RowBlock& block, int row, Segment segment, int first, int end) {
  TokenRange seen = block.seen[row];
  if (segment == Segment::kPages) seen.end = min_int(seen.end, block.packed_end[row]);
  if (segment == Segment::kWindow) seen.begin = max_int(seen.begin, block.packed_end[row]);
  return {max_int(0, seen.begin - first), min_int(kTileTokens, min_int(seen.end, end) - first)};
}

// Calls attend.operator()<R>(row, ranges) for up to `together` rows at a time, skipping those that see nothing of
// tokens [first, end).
template <class F>
void each_rows(const RowBlock& block, Segment segment, int first, int end, int together, F&& attend) {
  for (int row = 0; row < block.rows; row += together) {
    const int rows = min_int(together, block.rows - row);
    TokenRange range[4];
    bool any = false;
    for (int r = 0; r < rows; ++r) {
      range[r] = tile_range(block, row + r, segment, first, end);
      any |= range[r].begin < range[r].end;
    }
    if (!any) continue;
    switch (rows) {
      case 1:
        attend.template operator()<1>(row, range);
        break;
      case 2:
        attend.template operator()<2>(row, range);
        break;
      case 3:
        attend.template operator()<3>(row, range);
        break;
      default:
        attend.template operator()<4>(row, range);
        break;
    }
  }
}

// Whether every row of the block sees the same tokens of [first, end).
inline bool rows_see_the_same(const RowBlock& block, Segment segment, int first, int end) {
  const TokenRange of_first = tile_range(block, 0, segment, first, end);
  for (int r = 1; r < block.rows; ++r) {
    const TokenRange seen = tile_range(block, r, segment, first, end);
    if (seen.begin != of_first.begin || seen.end != of_first.end) return false;
  }
  return true;
}

template <DType D>
void attend_row_tiles(const DecodeArgs& a, const WorkItem& w, RowBlock& block, Segment segment, int first, int end) {
  RowTile tile;
  for (; first < end; first += kTileTokens) {
    find_rows(a.cache, w.sequence, w.head, segment == Segment::kSinks, first, end, tile);
    // Rows go together, but a value that is not finite must reach only the rows that see its token: 0 * NaN is NaN.
    const bool together = rows_see_the_same(block, segment, first, end) || values_are_finite<D>(tile, a.cache.head_dim);
    each_rows(block, segment, first, end, together ? 4 : 1,
              [&]<int R>(int row, const TokenRange* range) { attend_rows<D, R>(a, block, row, range, tile); });
  }
}

inline void attend_full_precision(const DecodeArgs& a, const WorkItem& w, RowBlock& block) {
  const int kv_len = a.cache.kv_len[w.sequence], sinks = min_int(a.cache.num_sinks, kv_len);
  int first = kv_len;
  for (int r = 0; r < block.rows; ++r) first = min_int(first, max_int(block.packed_end[r], block.seen[r].begin));
  with_dtype(a.cache.dtype, [&]<DType D>() {
    attend_row_tiles<D>(a, w, block, Segment::kSinks, 0, sinks);
    attend_row_tiles<D>(a, w, block, Segment::kWindow, max_int(first, sinks), kv_len);
  });
}

// Brings the codes of a record into the form that the kernels read: arrangement `lanes`, and bit planes where trits
// will not do.
inline void find_codes(const RecordFormat& format, const std::uint8_t* record, bool integer, const Scratch& scratch,
                       PackedTile& tile) {
  for (const Side side : kSides) {
    const TensorFormat& tensor = format.side(side);
    const int s = static_cast<int>(side);
    for (int b = 0; b < tensor.num_bands; ++b) {
      const Band& band = tensor.bands[b];
      const std::uint8_t* codes = record + tile.layout[s].band_offset[b];
      tile.codes[s][b] = codes;
      tile.code[s][b] = band.code;
      if (!is_base3(band.code) || (integer && side == Side::kValue)) continue;
      std::uint8_t* widened = scratch.codes + 16 * (s * tensor.head_dim + band.begin);
      widen_trits(side, band.channels, codes, widened);
      tile.codes[s][b] = widened;
      tile.code[s][b] = Code::kTernaryFast;
    }
  }
}

inline void attend_pages(const DecodeArgs& a, const WorkItem& w, RowBlock& block, const Scratch& scratch,
                         PackedTile& tile) {
  const CacheView& c = a.cache;
  int begin = w.tile_end, end = 0;  // tiles that some row sees
  for (int r = 0; r < block.rows; ++r) {
    const int stop = min_int(block.seen[r].end, block.packed_end[r]) - c.num_sinks;
    if (stop <= 0) continue;
    end = max_int(end, (stop + kTileTokens - 1) / kTileTokens);
    begin = min_int(begin, max_int(0, block.seen[r].begin - c.num_sinks) / kTileTokens);
  }
  end = min_int(end, w.tile_end);
  const bool may_be_integer = !a.exact && integer_kernel_reads(c.format);
  const bool lanes = c.format.arrangement == ArrangementKind::kLanes;
  for (int i = max_int(begin, w.tile_begin); i < end; ++i) {
    const std::uint8_t* record = c.record(w.sequence, i, w.head);
    tile.ahead = lanes && i + 1 < end ? c.record(w.sequence, i + 1, w.head) - record : 0;
    if (!lanes) {
      repack_record(c.format, ArrangementKind::kLanes, record, scratch.record);
      record = scratch.record;
    }
    load_tile_meta(c.format.meta, record, tile);
    // A token of NaN needs the care that only the exact kernel takes.
    [[maybe_unused]] const bool integer = may_be_integer && tile.finite;
    find_codes(c.format, record, integer, scratch, tile);
    const int first = c.num_sinks + i * kTileTokens;
    each_rows(block, Segment::kPages, first, first + kTileTokens, 4, [&]<int R>(int row, const TokenRange* range) {
#if SKVQ_HAS_SIMD
      if (integer) return attend_integer<R>(a, block, row, range, tile);
#endif
      attend_exact<R>(a, block, row, range, tile);
    });
  }
}

// Query rows of the item: row r is query token (first_row + r) / ratio, query head head * ratio + (first_row + r) %
// ratio.
inline void load_queries(const DecodeArgs& a, const WorkItem& w, const SideLayout& keys, RowBlock& block) {
  const CacheView& c = a.cache;
  const int ratio = a.num_q_heads / c.num_kv_heads, kv_len = c.kv_len[w.sequence];
  const int first_position = a.queries_in_cache ? kv_len - a.queries.length(w.sequence) : kv_len;
  for (int r = 0; r < block.rows; ++r) {
    const int query = (w.first_row + r) / ratio, q_head = w.head * ratio + (w.first_row + r) % ratio;
    const std::int64_t token = a.queries.begin(w.sequence) + query;
    float* q = block.q + r * c.head_dim;
    load_floats(a.q_dtype, a.q.data, token * a.q.token_stride + q_head * a.q.head_stride, c.head_dim, q);
    sum_groups(keys, q, block.group_sum + r * kMaxGroups);
#if SKVQ_HAS_SIMD
    quantize_query(c.format.k, keys, q, r, block.q8);
#endif
    for (int ch = 0; ch < c.head_dim; ch += kVector) store(block.o + r * c.head_dim + ch, Floats{});
    for (int g = 0; g < kMaxGroups; ++g) block.zeros[r * kMaxGroups + g] = 0.0f;
    block.state[r] = empty_state();
    block.seen[r] = visible(first_position + query, kv_len, a.sliding_window);
    block.packed_end[r] = packed_end(c, first_position + query, kv_len);
    block.shift[r] = a.logit_shift ? a.logit_shift[token * a.num_q_heads + q_head] : 0.0f;
  }
}

inline void attend_item(const DecodeArgs& a, const WorkItem& w, const Scratch& scratch) {
  SoftmaxState state[kRowsPerItem];
  TokenRange seen[kRowsPerItem];
  int packed[kRowsPerItem];
  float shift[kRowsPerItem], group_sum[kRowsPerItem * kMaxGroups], zeros[kRowsPerItem * kMaxGroups];
  float unit[kRowsPerItem * kMaxGroups], sum8[kRowsPerItem * kMaxGroups];
  const QuantizedRows q8{scratch.q8, scratch.q8 + kRowsPerItem * a.cache.head_dim, unit, sum8};
  RowBlock block{w.rows, scratch.q, group_sum, q8, w.partial, zeros, state, seen, packed, shift};
  PackedTile& tile = *static_cast<PackedTile*>(scratch.tile);
  for (const Side side : kSides) tile.layout[static_cast<int>(side)] = layout_of(a.cache, side, w.head);
  load_queries(a, w, tile.layout[0], block);
  if (w.full_precision) attend_full_precision(a, w, block);
  if (w.tile_end > w.tile_begin) attend_pages(a, w, block, scratch, tile);
  for (int r = 0; r < w.rows; ++r) {
    w.state[r] = state[r];
    for (int g = 0; g < tile.layout[1].num_groups; ++g) {
      const Group& group = tile.layout[1].groups[g];
      float* o = w.partial + r * a.cache.head_dim;
      for (int c = group.begin; c < group.end; c += kVector) store(o + c, load(o + c) + zeros[r * kMaxGroups + g]);
    }
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

// Decode attention: one softmax over sinks, packed pages and window.
//
// Work is cut into items of (sequence, KV head, rows, segment part); each leaves a partial softmax state that
// `combine` merges in a fixed order. How it is cut depends on the shapes of the one sequence only, so results do
// not change with the number of threads or with what else is in the batch.
#pragma once

#include "cpu/float_kernel.h"
#include "cpu/integer_kernel.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// Scale, shift, softcap and mask; then logits become probabilities under the row's new maximum. Returns the factor by
// which what was summed before must be multiplied.
inline float softmax_step(const DecodeArgs& a, float shift, TokenRange seen, float* s, SoftmaxState& state) {
  Floats logit[kTileTokens / kVector];
  Floats top = splat(state.max);
  for (int i = 0; i < kTileTokens / kVector; ++i) {
    logit[i] = load(s + i * kVector) * a.softmax_scale + shift;
    if (a.softcap > 0.0f) {
      for (int lane = 0; lane < kVector; ++lane) logit[i][lane] = a.softcap * ::tanhf(logit[i][lane] / a.softcap);
    }
    const Ints token = lane_index() + i * kVector;
    logit[i] = (token >= seen.begin) & (token < seen.end) ? logit[i] : splat(minus_infinity());
    top = logit[i] > top ? logit[i] : top;
  }
  const float max = largest(top);
  const float base = max == minus_infinity() ? 0.0f : max;
  Floats sums = {};
  for (int i = 0; i < kTileTokens / kVector; ++i) {
    const Floats p = exp_nonpositive(logit[i] - base);
    store(s + i * kVector, p);
    sums += p;
  }
  const float factor = rescale(state.max, max);
  state = {max, state.sum * factor + sum(sums)};
  return factor;
}

// Tokens of a tile a row reads from this segment, as [begin, end) inside the tile.
inline TokenRange tile_range(const RowBlock& block, int row, const TileValues& tile, bool sinks, int limit) {
  TokenRange seen = block.seen[row];
  if (tile.quantized) {
    seen.end = min_int(seen.end, block.packed_end[row]);
  } else if (!sinks) {
    seen.begin = max_int(seen.begin, block.packed_end[row]);
  }
  seen.end = min_int(seen.end, limit);
  return {max_int(0, seen.begin - tile.first), min_int(kTileTokens, seen.end - tile.first)};
}

// R rows against a tile whose values are floats.
template <int R>
void attend_floats(const DecodeArgs& a, RowBlock& block, int row, const TokenRange* range, const TileValues& tile) {
  const RecordFormat& format = a.cache.format;
  float s[R][kTileTokens], factor[R];
  if (tile.quantized) {
    code_logits<R>(format.k, block, row, tile, s);
  } else {
    row_logits<R>(format.k.head_dim, block, row, tile, s);
  }
  TokenRange any = {kTileTokens, 0};  // tokens that some row sees
  for (int r = 0; r < R; ++r) {
    factor[r] = softmax_step(a, block.shift[row + r], range[r], s[r], block.state[row + r]);
    if (range[r].begin >= range[r].end) continue;
    any = {min_int(any.begin, range[r].begin), max_int(any.end, range[r].end)};
  }
  accumulate<R>(format.v, block, row, tile, any, s, factor);
}

#if SKVQ_HAS_SIMD
// R rows against the bytes of a record; needs scales and zeros in `tile`.
template <int R>
void attend_codes(const DecodeArgs& a, RowBlock& block, int row, const TokenRange* range, const TileValues& tile,
                  const std::uint8_t* record) {
  const RecordFormat& format = a.cache.format;
  float s[R][kTileTokens] = {}, factor[R];
  for (int b = 0; b < format.k.num_bands; ++b) add_band_logits<R>(format, b, block, row, tile, record, s);
  for (int r = 0; r < R; ++r) {
    factor[r] = softmax_step(a, block.shift[row + r], range[r], s[r], block.state[row + r]);
  }
  add_values<R>(format, block, row, tile, record, s, factor);
}
#endif

// `record` is null where the tile's values are floats.
inline void attend_tile(const DecodeArgs& a, RowBlock& block, const TileValues& tile, const std::uint8_t* record,
                        bool sinks, int limit) {
#if !SKVQ_HAS_SIMD
  (void)record;
#endif
  // Rows go together, but a value that is not finite must reach only the rows that see its token: 0 * NaN is NaN.
  constexpr int kRows = 4;
  const int step = tile.finite ? kRows : 1;
  for (int row = 0; row < block.rows; row += step) {
    const int rows = min_int(step, block.rows - row);
    TokenRange range[kRows];
    bool any = false;
    for (int r = 0; r < rows; ++r) {
      range[r] = tile_range(block, row + r, tile, sinks, limit);
      any |= range[r].begin < range[r].end;
    }
    if (!any) continue;
    const auto attend = [&]<int R>() {
#if SKVQ_HAS_SIMD
      if (record != nullptr) return attend_codes<R>(a, block, row, range, tile, record);
#endif
      attend_floats<R>(a, block, row, range, tile);
    };
    switch (rows) {
      case 1:
        attend.template operator()<1>();
        break;
      case 2:
        attend.template operator()<2>();
        break;
      case 3:
        attend.template operator()<3>();
        break;
      default:
        attend.template operator()<4>();
        break;
    }
  }
}

inline void attend_full_precision(const DecodeArgs& a, const WorkItem& w, RowBlock& block, TileValues& tile) {
  const CacheView& c = a.cache;
  const int kv_len = c.kv_len[w.sequence], sinks = min_int(c.num_sinks, kv_len);
  for (int p = 0; p < sinks; p += kTileTokens) {
    load_rows(c, w.sequence, w.head, true, p, sinks, tile);
    attend_tile(a, block, tile, nullptr, true, sinks);
  }
  int first = kv_len;
  for (int r = 0; r < block.rows; ++r) first = min_int(first, max_int(block.packed_end[r], block.seen[r].begin));
  for (int p = max_int(first, sinks); p < kv_len; p += kTileTokens) {
    load_rows(c, w.sequence, w.head, false, p, kv_len, tile);
    attend_tile(a, block, tile, nullptr, false, kv_len);
  }
}

inline void attend_pages(const DecodeArgs& a, const WorkItem& w, RowBlock& block, TileValues& tile) {
  const CacheView& c = a.cache;
  int first = w.tile_end, end = 0;  // tiles that some row sees
  for (int r = 0; r < block.rows; ++r) {
    const int stop = min_int(block.seen[r].end, block.packed_end[r]) - c.num_sinks;
    if (stop <= 0) continue;
    end = max_int(end, (stop + kTileTokens - 1) / kTileTokens);
    first = min_int(first, max_int(0, block.seen[r].begin - c.num_sinks) / kTileTokens);
  }
  const bool integer = !a.exact && integer_kernel_reads(c.format);
  for (int i = max_int(first, w.tile_begin); i < min_int(end, w.tile_end); ++i) {
    const std::uint8_t* record = c.record(w.sequence, i, w.head);
    tile.ahead = i + 1 < min_int(end, w.tile_end) ? c.record(w.sequence, i + 1, w.head) - record : 0;
    tile.first = c.num_sinks + i * kTileTokens;
    tile.quantized = true;
    // A scale that is NaN needs the care that only the exact kernel takes.
    const bool codes = integer && load_scales(c, record, w.head, tile);
    if (!codes) load_record(c, record, w.head, tile);
    attend_tile(a, block, tile, codes ? record : nullptr, false, tile.first + kTileTokens);
  }
}

// Query rows of the item: row r is query token (first_row + r) / ratio, query head head * ratio + (first_row + r) %
// ratio.
inline void load_queries(const DecodeArgs& a, const WorkItem& w, RowBlock& block) {
  const CacheView& c = a.cache;
  const int ratio = a.num_q_heads / c.num_kv_heads, kv_len = c.kv_len[w.sequence];
  const int first_position = a.queries_in_cache ? kv_len - a.queries.length(w.sequence) : kv_len;
  for (int r = 0; r < block.rows; ++r) {
    const int query = (w.first_row + r) / ratio, q_head = w.head * ratio + (w.first_row + r) % ratio;
    const std::int64_t token = a.queries.begin(w.sequence) + query;
    float* q = block.q + r * c.head_dim;
    load_floats(a.q_dtype, a.q.data, token * a.q.token_stride + q_head * a.q.head_stride, c.head_dim, q);
    sum_groups(c.format.k, q, block.group_sum + r * kMaxGroups);
#if SKVQ_HAS_SIMD
    quantize_query(c.format.k, q, r, block.q8);
#endif
    for (int ch = 0; ch < c.head_dim; ++ch) block.o[r * c.head_dim + ch] = 0.0f;
    block.state[r] = empty_state();
    block.seen[r] = visible(first_position + query, kv_len, a.sliding_window);
    block.packed_end[r] = packed_end(c, first_position + query, kv_len);
    block.shift[r] = a.logit_shift ? a.logit_shift[token * a.num_q_heads + q_head] : 0.0f;
  }
}

inline void attend_item(const DecodeArgs& a, const WorkItem& w, Scratch& scratch) {
  TileValues& tile = *static_cast<TileValues*>(scratch.tile);
  tile.k = scratch.k;
  tile.v = scratch.v;
  SoftmaxState state[kRowsPerItem];
  TokenRange seen[kRowsPerItem];
  int packed[kRowsPerItem];
  float shift[kRowsPerItem], group_sum[kRowsPerItem * kMaxGroups];
  float unit[kRowsPerItem * kMaxGroups], sum8[kRowsPerItem * kMaxGroups];
  const QuantizedRows q8{scratch.q8, scratch.q8 + kRowsPerItem * a.cache.head_dim, unit, sum8};
  RowBlock block{w.rows, scratch.q, group_sum, q8, w.partial, state, seen, packed, shift};
  load_queries(a, w, block);
  if (w.full_precision) attend_full_precision(a, w, block, tile);
  if (w.tile_end > w.tile_begin) attend_pages(a, w, block, tile);
  for (int r = 0; r < w.rows; ++r) w.state[r] = state[r];
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

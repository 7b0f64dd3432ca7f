// Decode attention: one softmax over sinks, packed pages and window.
//
// Work is cut into items of (sequence, KV head, rows, segment part); each leaves a partial softmax state that
// `combine` merges in a fixed order. How it is cut depends on the shapes of the one sequence only, so results do
// not change with the number of threads or with what else is in the batch.
#pragma once

#include "core/softmax.h"
#include "core/window.h"
#include "cpu/decode_plan.h"
#include "cpu/tile.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// 64 tokens in a form that all segments share. Unquantized rows have no scale and zero.
struct TileValues {
  float* k;  // [token block][channel][16 tokens]: codes or values
  float* v;  // [token][channel]
  float scale[2][kMaxGroups][kTileTokens];
  float zero[2][kMaxGroups][kTileTokens];
  bool quantized;
  bool finite;  // no NaN and no infinity among the values of V
  int first;    // position of token 0
};

// Rows of the query that share a KV head, with their softmax states.
struct RowBlock {
  int rows;
  float* q;          // [rows][head_dim]
  float* group_sum;  // [rows][kMaxGroups]: sum of q over the channels of each K group
  float* o;          // [rows][head_dim]
  SoftmaxState* state;
  TokenRange* seen;  // positions the row may see
  int* packed_end;   // first position the row reads in full precision after the sinks
  float* shift;
};

// Scales and zeros of one side; false where a group holds a NaN.
template <class Arrangement>
bool load_meta_section(const RecordFormat& format, Side side, Exponents exponents, const std::uint8_t* record,
                       TileValues& tile) {
  const int groups = format.side(side).num_groups();
  const std::uint8_t* meta = record + format.meta_offset(side);
  const float scale_unit = power_of_two(exponents.scale), zero_unit = power_of_two(exponents.zero);
  float nan = 0.0f;
  for (int g = 0; g < groups; ++g) {
    const float centre = code_centre(format.side(side).bands[format.side(side).group_at(g).band].code);
    for (int t = 0; t < kTileTokens; ++t) {
      const auto at = [&](int which) {
        return decode_meta(format.meta, load_meta(format.meta, meta, Arrangement::meta(groups, t, g, which)));
      };
      tile.scale[static_cast<int>(side)][g][t] = at(0) * scale_unit;
      tile.zero[static_cast<int>(side)][g][t] = at(1) * zero_unit + at(0) * scale_unit * centre;
      nan += tile.scale[static_cast<int>(side)][g][t] * 0.0f;
    }
  }
  return nan == 0.0f;
}

template <class Arrangement>
void load_record(const CacheView& c, const std::uint8_t* record, int head, TileValues& tile) {
  for (const Side side : kSides) {
    const TensorFormat& tensor = c.format.side(side);
    tile.finite = load_meta_section<Arrangement>(c.format, side, c.exponents_of(side, head), record, tile);
    for (int b = 0; b < tensor.num_bands; ++b) {
      unpack_band<Arrangement>(side, tensor.bands[b], c.head_dim, record + c.format.band_offset(side, b),
                               side == Side::kKey ? tile.k : tile.v);
    }
  }
  tile.quantized = true;
}

template <DType D>
void load_row(const void* k, const void* v, std::int64_t row, int t, int head_dim, TileValues& tile) {
  float nan = 0.0f;
  for (int c = 0; c < head_dim; ++c) {
    tile.k[float_index(Side::kKey, head_dim, t, c)] = load_float(D, k, row + c);
    const float value = load_float(D, v, row + c);
    tile.v[float_index(Side::kValue, head_dim, t, c)] = value;
    nan += value * 0.0f;
  }
  tile.finite &= nan == 0.0f;
}

// Rows [first, end) of sinks or ring; what lies beyond is zero and masked.
inline void load_rows(const CacheView& c, int sequence, int head, bool sinks, int first, int end, TileValues& tile) {
  tile.finite = true;
  for (int t = 0; t < kTileTokens; ++t) {
    const int p = first + t;
    if (p >= end) {
      for (int ch = 0; ch < c.head_dim; ++ch) {
        tile.k[float_index(Side::kKey, c.head_dim, t, ch)] = 0.0f;
        tile.v[float_index(Side::kValue, c.head_dim, t, ch)] = 0.0f;
      }
      continue;
    }
    const std::int64_t row = sinks ? c.sink_row(sequence, p, head) : c.ring_row(sequence, p, head);
    const void* k = sinks ? c.sink_k : c.ring_k;
    const void* v = sinks ? c.sink_v : c.ring_v;
    switch (c.dtype) {
      case DType::kF32:
        load_row<DType::kF32>(k, v, row, t, c.head_dim, tile);
        break;
      case DType::kF16:
        load_row<DType::kF16>(k, v, row, t, c.head_dim, tile);
        break;
      case DType::kBf16:
        load_row<DType::kBf16>(k, v, row, t, c.head_dim, tile);
        break;
    }
  }
  tile.first = first;
  tile.quantized = false;
}

// Logits of R rows against 64 tokens.
template <int R>
void logits(const TensorFormat& format, const RowBlock& block, int row, const TileValues& tile,
            float s[][kTileTokens]) {
  const int groups = tile.quantized ? format.num_groups() : 1;
  for (int tb = 0; tb < kTileTokens / kVector; tb += 2) {
    const float* k0 = tile.k + tb * format.head_dim * kVector;
    const float* k1 = k0 + format.head_dim * kVector;
    Float16 total[R][2] = {};
    for (int g = 0; g < groups; ++g) {
      const Group group = tile.quantized ? format.group_at(g) : Group{0, format.head_dim, 0};
      // Even and odd channels apart: shorter chains of additions, less rounding.
      Float16 dot[R][2] = {}, odd[R][2] = {};
      for (int c = group.begin; c < group.end; c += 2) {
        const float* k = k0 + c * kVector;
        const float* next = k1 + c * kVector;
        for (int r = 0; r < R; ++r) {
          const float* q = block.q + (row + r) * format.head_dim + c;
          dot[r][0] += q[0] * load(k);
          odd[r][0] += q[1] * load(k + kVector);
          dot[r][1] += q[0] * load(next);
          odd[r][1] += q[1] * load(next + kVector);
        }
      }
      for (int r = 0; r < R; ++r) {
        dot[r][0] += odd[r][0];
        dot[r][1] += odd[r][1];
      }
      for (int i = 0; i < 2; ++i) {
        for (int r = 0; r < R; ++r) {
          if (!tile.quantized) {
            total[r][i] = dot[r][i];
            continue;
          }
          const float sum_q = block.group_sum[(row + r) * kMaxGroups + g];
          total[r][i] += load(tile.scale[0][g] + (tb + i) * kVector) * dot[r][i] +
                         load(tile.zero[0][g] + (tb + i) * kVector) * sum_q;
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      store(s[r] + tb * kVector, total[r][0]);
      store(s[r] + (tb + 1) * kVector, total[r][1]);
    }
  }
}

// Scale, shift, softcap and mask; then logits become probabilities under the row's new maximum. Returns the factor by
// which what was summed before must be multiplied.
inline float softmax_step(const DecodeArgs& a, float shift, int begin, int end, float* s, SoftmaxState& state) {
  for (int t = 0; t < kTileTokens; ++t) s[t] = s[t] * a.softmax_scale + shift;
  if (a.softcap > 0.0f) {
    for (int t = 0; t < kTileTokens; ++t) s[t] = a.softcap * ::tanhf(s[t] / a.softcap);
  }
  float max = state.max;
  for (int t = begin; t < end; ++t) max = s[t] > max ? s[t] : max;
  const float base = max == minus_infinity() ? 0.0f : max;
  for (int t = 0; t < kTileTokens; ++t) s[t] = t >= begin && t < end ? s[t] - base : minus_infinity();
  Float16 sums = {};
  for (int t = 0; t < kTileTokens; t += kVector) {
    const Float16 p = exp_nonpositive(load(s + t));
    store(s + t, p);
    sums += p;
  }
  const float factor = rescale(state.max, max);
  state = {max, state.sum * factor + sum(sums)};
  return factor;
}

// Sums of weighted values over tokens [begin, end) for R rows and V vectors of channels.
template <int R, int V>
SKVQ_FN void weigh_values(const RowBlock& block, int row, const float* values, int head_dim, int channel,
                          TokenRange tokens, const float weight[][kTileTokens], const float* factor,
                          const float* zero) {
  Float16 acc[R][V] = {};
  for (int t = tokens.begin; t < tokens.end; ++t) {
    Float16 value[V];
    for (int i = 0; i < V; ++i) value[i] = load(values + t * head_dim + channel + i * kVector);
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < V; ++i) acc[r][i] += weight[r][t] * value[i];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < V; ++i) {
      float* o = block.o + (row + r) * head_dim + channel + i * kVector;
      store(o, load(o) * factor[r] + acc[r][i] + zero[r]);
    }
  }
}

// o = o * factor + p V for R rows.
template <int R>
void accumulate(const TensorFormat& format, const RowBlock& block, int row, const TileValues& tile, TokenRange tokens,
                const float p[][kTileTokens], const float* factor) {
  const int groups = tile.quantized ? format.num_groups() : 1;
  for (int g = 0; g < groups; ++g) {
    const Group group = tile.quantized ? format.group_at(g) : Group{0, format.head_dim, 0};
    float weight[R][kTileTokens], zero[R] = {};
    for (int r = 0; r < R; ++r) {
      Float16 zeros = {};
      for (int t = 0; t < kTileTokens; t += kVector) {
        const Float16 prob = load(p[r] + t);
        store(weight[r] + t, tile.quantized ? prob * load(tile.scale[1][g] + t) : prob);
        // A token that is masked may hold NaN.
        if (tile.quantized) zeros += prob != 0.0f ? prob * load(tile.zero[1][g] + t) : Float16{};
      }
      zero[r] = sum(zeros);
    }
    int c = group.begin;
    for (; c + 2 * kVector <= group.end; c += 2 * kVector) {
      weigh_values<R, 2>(block, row, tile.v, format.head_dim, c, tokens, weight, factor, zero);
    }
    if (c < group.end) weigh_values<R, 1>(block, row, tile.v, format.head_dim, c, tokens, weight, factor, zero);
  }
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

template <int R>
void attend_rows(const DecodeArgs& a, RowBlock& block, int row, const TokenRange* range, const TileValues& tile) {
  const RecordFormat& format = a.cache.format;
  float s[R][kTileTokens], factor[R];
  logits<R>(format.k, block, row, tile, s);
  TokenRange any = {kTileTokens, 0};  // tokens that some row sees
  for (int r = 0; r < R; ++r) {
    factor[r] = softmax_step(a, block.shift[row + r], range[r].begin, range[r].end, s[r], block.state[row + r]);
    if (range[r].begin >= range[r].end) continue;
    any = {min_int(any.begin, range[r].begin), max_int(any.end, range[r].end)};
  }
  accumulate<R>(format.v, block, row, tile, any, s, factor);
}

inline void attend_tile(const DecodeArgs& a, RowBlock& block, const TileValues& tile, bool sinks, int limit) {
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
    switch (rows) {
      case 1:
        attend_rows<1>(a, block, row, range, tile);
        break;
      case 2:
        attend_rows<2>(a, block, row, range, tile);
        break;
      case 3:
        attend_rows<3>(a, block, row, range, tile);
        break;
      default:
        attend_rows<4>(a, block, row, range, tile);
        break;
    }
  }
}

inline void attend_full_precision(const DecodeArgs& a, const WorkItem& w, RowBlock& block, TileValues& tile) {
  const CacheView& c = a.cache;
  const int kv_len = c.kv_len[w.sequence], sinks = min_int(c.num_sinks, kv_len);
  for (int p = 0; p < sinks; p += kTileTokens) {
    load_rows(c, w.sequence, w.head, true, p, sinks, tile);
    attend_tile(a, block, tile, true, sinks);
  }
  int first = kv_len;
  for (int r = 0; r < block.rows; ++r) first = min_int(first, max_int(block.packed_end[r], block.seen[r].begin));
  for (int p = max_int(first, sinks); p < kv_len; p += kTileTokens) {
    load_rows(c, w.sequence, w.head, false, p, kv_len, tile);
    attend_tile(a, block, tile, false, kv_len);
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
  for (int i = max_int(first, w.tile_begin); i < min_int(end, w.tile_end); ++i) {
    const std::uint8_t* record = c.record(w.sequence, i, w.head);
    if (c.format.arrangement == ArrangementKind::kLanes) {
      load_record<Lanes>(c, record, w.head, tile);
    } else {
      load_record<Rows>(c, record, w.head, tile);
    }
    tile.first = c.num_sinks + i * kTileTokens;
    attend_tile(a, block, tile, false, tile.first + kTileTokens);
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
    for (int ch = 0; ch < c.head_dim; ++ch) {
      q[ch] = load_float(a.q_dtype, a.q.data, token * a.q.token_stride + q_head * a.q.head_stride + ch);
    }
    for (int g = 0; g < c.format.k.num_groups(); ++g) {
      const Group group = c.format.k.group_at(g);
      float total = 0.0f;
      for (int ch = group.begin; ch < group.end; ++ch) total += q[ch];
      block.group_sum[r * kMaxGroups + g] = total;
    }
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
  RowBlock block{w.rows, scratch.q, group_sum, w.partial, state, seen, packed, shift};
  load_queries(a, w, block);
  if (w.full_precision) attend_full_precision(a, w, block, tile);
  if (w.tile_end > w.tile_begin) attend_pages(a, w, block, tile);
  for (int r = 0; r < w.rows; ++r) w.state[r] = state[r];
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

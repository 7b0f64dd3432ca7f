// Append: pack the tiles that are complete now, then copy the new rows into sinks and ring.
#pragma once

#include "core/quantize.h"
#include "core/window.h"
#include "cpu/tile.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// One side of one tile of one head, channels outermost so that 64 tokens are quantized side by side.
struct TileRows {
  float x[kMaxHeadDim * kTileTokens];             // [channel][token]
  std::uint8_t codes[kMaxHeadDim * kTileTokens];  // [channel][token]
};

template <DType D>
void load_channels(const void* row, int token, int head_dim, float* x) {
  for (int c = 0; c < head_dim; ++c) x[c * kTileTokens + token] = load_float(D, row, c);
}

inline const void* offset(const void* data, std::int64_t index, DType dtype) {
  return static_cast<const char*>(data) + index * dtype_bytes(dtype);
}

// The row of a token that is either in the ring already or in this call's input.
inline const void* source_row(const AppendArgs& a, Side side, int sequence, int head, int position, int old_len) {
  const CacheView& c = a.cache;
  if (position < old_len)
    return offset(side == Side::kKey ? c.ring_k : c.ring_v, c.ring_row(sequence, position, head), c.dtype);
  const RowsView& rows = side == Side::kKey ? a.k : a.v;
  const std::int64_t token = a.tokens.begin(sequence) + position - old_len;
  return offset(rows.data, token * rows.token_stride + head * rows.head_stride, c.dtype);
}

// Scale, zero and codes of one group for 64 tokens.
inline void quantize_group(const Group& group, Code code, float clip, Meta meta, Exponents exponents, TileRows& tile,
                           GroupQuantizer* quantizers) {
  const int levels = traits(code).levels;
  float low[kTileTokens], high[kTileTokens], nan[kTileTokens] = {};
  const float* first = tile.x + group.begin * kTileTokens;
  for (int t = 0; t < kTileTokens; ++t) low[t] = high[t] = first[t];
  for (int c = group.begin; c < group.end; ++c) {
    const float* x = tile.x + c * kTileTokens;
    for (int t = 0; t < kTileTokens; ++t) {
      low[t] = x[t] < low[t] ? x[t] : low[t];
      high[t] = x[t] > high[t] ? x[t] : high[t];
      nan[t] += x[t] * 0.0f;  // stays 0 while all is finite
    }
  }
  for (int t = 0; t < kTileTokens; ++t) {
    quantizers[t] = make_group_quantizer(low[t], high[t], nan[t] == 0.0f, clip, levels, meta, exponents);
  }
  float zero[kTileTokens], inverse[kTileTokens];
  for (int t = 0; t < kTileTokens; ++t) {
    zero[t] = quantizers[t].zero;
    inverse[t] = quantizers[t].inverse;
  }
  for (int c = group.begin; c < group.end; ++c) {
    for (int t = 0; t < kTileTokens; ++t) {
      const GroupQuantizer g{zero[t], 0.0f, inverse[t], 0, 0};
      tile.codes[c * kTileTokens + t] = static_cast<std::uint8_t>(quantize(tile.x[c * kTileTokens + t], g, levels));
    }
  }
}

template <class Arrangement>
void pack_side(const RecordFormat& format, Side side, const float* clip, Exponents exponents, TileRows& tile,
               std::uint8_t* record) {
  const TensorFormat& tensor = format.side(side);
  const int groups = tensor.num_groups();
  std::uint8_t* meta = record + format.meta_offset(side);
  for (int g = 0; g < groups; ++g) {
    const Group group = tensor.group_at(g);
    GroupQuantizer quantizers[kTileTokens];
    quantize_group(group, tensor.bands[group.band].code, clip[g], format.meta, exponents, tile, quantizers);
    for (int t = 0; t < kTileTokens; ++t) {
      store_meta(format.meta, meta, Arrangement::meta(groups, t, g, 0), quantizers[t].scale_bits);
      store_meta(format.meta, meta, Arrangement::meta(groups, t, g, 1), quantizers[t].zero_bits);
    }
  }
  for (int b = 0; b < tensor.num_bands; ++b) {
    const Band& band = tensor.bands[b];
    pack_band<Arrangement>(side, band, tile.codes + band.begin * kTileTokens, record + format.band_offset(side, b));
  }
}

inline void flush_tile(const AppendArgs& a, int sequence, int head, int tile_index) {
  const CacheView& c = a.cache;
  const int old_len = c.kv_len[sequence];
  std::uint8_t* record = c.record(sequence, tile_index, head);
  TileRows tile;
  for (const Side side : kSides) {
    for (int t = 0; t < kTileTokens; ++t) {
      const void* row = source_row(a, side, sequence, head, c.num_sinks + tile_index * kTileTokens + t, old_len);
      switch (c.dtype) {
        case DType::kF32:
          load_channels<DType::kF32>(row, t, c.head_dim, tile.x);
          break;
        case DType::kF16:
          load_channels<DType::kF16>(row, t, c.head_dim, tile.x);
          break;
        case DType::kBf16:
          load_channels<DType::kBf16>(row, t, c.head_dim, tile.x);
          break;
      }
    }
    const float* clip = side == Side::kKey ? a.k_clip : a.v_clip;
    clip += head * c.format.side(side).num_groups();
    const Exponents exponents = c.exponents_of(side, head);
    visit_arrangement(c.format.arrangement,
                      [&]<class A>() { pack_side<A>(c.format, side, clip, exponents, tile, record); });
  }
}

// New rows of one sequence and head into sinks and ring.
inline void store_rows(const AppendArgs& a, int sequence, int head) {
  const CacheView& c = a.cache;
  const int old_len = c.kv_len[sequence], new_len = old_len + a.tokens.length(sequence);
  const int bytes = c.head_dim * dtype_bytes(c.dtype);
  const int ring_first = ring_begin(new_len, c.num_sinks, c.ring_slots);
  for (int p = old_len; p < new_len; ++p) {
    const bool sink = p < c.num_sinks;
    if (!sink && p < ring_first) continue;
    const std::int64_t row = sink ? c.sink_row(sequence, p, head) : c.ring_row(sequence, p, head);
    for (const Side side : kSides) {
      void* base = sink ? (side == Side::kKey ? c.sink_k : c.sink_v) : (side == Side::kKey ? c.ring_k : c.ring_v);
      void* to = const_cast<void*>(offset(base, row, c.dtype));
      std::memcpy(to, source_row(a, side, sequence, head, p, old_len), bytes);
    }
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

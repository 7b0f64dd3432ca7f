// Append: pack the tiles that are complete now, then copy the new rows into sinks and ring.
#pragma once

#include <algorithm>

#include "core/quantize.h"
#include "core/window.h"
#include "cpu/tile.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

inline const void* offset(const void* data, std::int64_t index, DType dtype) {
  return static_cast<const char*>(data) + index * dtype_bytes(dtype);
}

// Rows of one side of one head, by position: in the ring already, or in this call's input.
struct RowSource {
  const CacheView& cache;
  int sequence, head, old_len;
  const void *ring, *input;
  std::int64_t input_stride;

  RowSource(const AppendArgs& a, Side side, int sequence, int head)
      : cache(a.cache), sequence(sequence), head(head), old_len(a.cache.kv_len[sequence]) {
    const RowsView& rows = side == Side::kKey ? a.k : a.v;
    ring = side == Side::kKey ? cache.ring_k : cache.ring_v;
    input = offset(rows.data, a.tokens.begin(sequence) * rows.token_stride + head * rows.head_stride, cache.dtype);
    input_stride = rows.token_stride;
  }
  const void* at(int position) const {
    if (position < old_len) return offset(ring, cache.ring_row(sequence, position, head), cache.dtype);
    return offset(input, (position - old_len) * input_stride, cache.dtype);
  }
};

// A strip: sixteen tokens of one group, in blocks of 16 x 16 that are turned as their codes will be.
struct Strip {
  float x[kMaxHeadDim / 16][16][16];  // [block of channels][field][lane]
  float low[16], high[16], nan[16];   // of every token; nan is 0 where all is finite
  float clip[16];
  float zero[16], scale[16], inverse[16];
  std::uint16_t scale_bits[16], zero_bits[16];

  GroupQuantizer quantizer(int token) const { return {zero[token], scale[token], inverse[token], 0, 0}; }

  void set_extent(int token, const Extent& e) {
    store(low + token, e.low);
    store(high + token, e.high);
    store(nan + token, e.nan);
  }
};

// Rows from `channel` on with tokens as lanes, a square at a time. Two extents, because a product waits for the last.
template <DType D>
void load_tokens_as_lanes(const void* const* rows, int channel, int channels, Strip& strip) {
  for (int t = 0; t < 16; t += kVector) {
    Extent even = Extent::of_nothing(), odd = even;
    for (int block = 0; block < channels / 16; ++block) {
      for (int c = 0; c < 16; c += kVector) {
        Floats v[kVector];
        for (int i = 0; i < kVector; ++i) v[i] = load_as<D>(rows[t + i], channel + block * 16 + c);
        transpose(v);
        for (int i = 0; i < kVector; ++i) {
          store(&strip.x[block][c + i][t], v[i]);
          (i % 2 == 0 ? even : odd).add(v[i]);
        }
      }
    }
    even.add(odd);
    strip.set_extent(t, even);
  }
}

template <DType D>
void load_channels_as_lanes(const void* const* rows, int channel, int channels, Strip& strip) {
  for (int t = 0; t < 16; t += kVector) {
    Extent extent[kVector];
    for (int i = 0; i < kVector; ++i) {
      const void* row = rows[t + i];
      Extent even = Extent::of_nothing(), odd = even;
      for (int block = 0; block < channels / 16; ++block) {
#pragma GCC unroll 4
        for (int c = 0; c < 16; c += kVector) {
          const Floats v = load_as<D>(row, channel + block * 16 + c);
          store(&strip.x[block][t + i][c], v);
          (c / kVector % 2 == 0 ? even : odd).add(v);
        }
      }
      even.add(odd);
      extent[i] = even;
    }
    strip.set_extent(t, extents(extent));
  }
}

// Of every token; compilers make vector instructions of the loop.
template <Meta M>
void make_quantizers(int levels, Exponents exponents, Strip& s) {
  for (int t = 0; t < 16; ++t) {
    const GroupQuantizer g =
        make_group_quantizer(s.low[t], s.high[t], s.nan[t] == 0.0f, s.clip[t], levels, M, exponents);
    s.zero[t] = g.zero;
    s.scale[t] = g.scale;
    s.inverse[t] = g.inverse;
    s.scale_bits[t] = g.scale_bits;
    s.zero_bits[t] = g.zero_bits;
  }
}

// Unrolling the inner loop would make compilers take the outer one for the one to vectorize, by gathers.
template <bool TokensAsLanes>
void quantize_block(const Strip& s, int block, int levels, Block& codes) {
  for (int f = 0; f < 16; ++f) {
#pragma GCC unroll 1
    for (int lane = 0; lane < 16; ++lane) {
      const int token = TokensAsLanes ? lane : f;
      codes.field[f][lane] = static_cast<std::uint32_t>(quantize(s.x[block][f][lane], s.quantizer(token), levels));
    }
  }
}

// What every token of a block errs with its quantizer, added to `sums`.
template <bool TokensAsLanes>
void add_errors(const Strip& s, int block, int levels, const float* parts, std::uint32_t* sums) {
  for (int f = 0; f < 16; ++f) {
#pragma GCC unroll 1
    for (int lane = 0; lane < 16; ++lane) {
      const int token = TokensAsLanes ? lane : f;
      sums[token] += squared_error(s.x[block][f][lane], s.quantizer(token), levels, parts[token]);
    }
  }
}

// Sets the clip ratio of every token: the only one, or the first that errs least.
template <Meta M, bool TokensAsLanes>
void choose_clips(const float* choices, int count, int blocks, int levels, Exponents exponents, Strip& s) {
  std::fill_n(s.clip, 16, choices[0]);
  if (count == 1) return;
  float parts[16], best[16];
  std::uint32_t least[16];
  for (int t = 0; t < 16; ++t) parts[t] = error_parts(s.low[t], s.high[t]);
  for (int c = 0; c < count; ++c) {
    std::fill_n(s.clip, 16, choices[c]);
    make_quantizers<M>(levels, exponents, s);
    std::uint32_t errors[16] = {};
    for (int block = 0; block < blocks; ++block) add_errors<TokensAsLanes>(s, block, levels, parts, errors);
    for (int t = 0; t < 16; ++t) {
      const bool better = c == 0 || errors[t] < least[t];
      least[t] = better ? errors[t] : least[t];
      best[t] = better ? choices[c] : best[t];
    }
  }
  std::copy_n(best, 16, s.clip);
}

// What the groups of one side of a tile have in common.
struct SideSource {
  const void* rows[kTileTokens];
  DType dtype;
  ClipTable clip;
  int head;
  Exponents exponents;
};

// Tokens 16 tb to 16 tb + 15 of group g; the codes' bytes were 0.
template <class Arrangement>
void pack_strip(const RecordFormat& format, Side side, const SideSource& source, int g, int tb, std::uint8_t* record) {
  const TensorFormat& tensor = format.side(side);
  const Group group = tensor.group_at(g);
  const Band& band = tensor.bands[group.band];
  const int levels = traits(band.code).levels, channels = group.end - group.begin, groups = tensor.num_groups();
  const bool tokens = lanes_are_tokens(side, band.code);
  Strip strip;
  with_dtype(source.dtype, [&]<DType D>() {
    const auto load = tokens ? load_tokens_as_lanes<D> : load_channels_as_lanes<D>;
    load(source.rows + tb * 16, group.begin, channels, strip);
  });
  const float* choices = source.clip.of(source.head, groups, g);
  const auto make = [&]<Meta M>() {
    const auto choose = tokens ? choose_clips<M, true> : choose_clips<M, false>;
    choose(choices, source.clip.choices, channels / 16, levels, source.exponents, strip);
    make_quantizers<M>(levels, source.exponents, strip);
  };
  format.meta == Meta::kE4m3 ? make.template operator()<Meta::kE4m3>() : make.template operator()<Meta::kFp16>();
  std::uint8_t* meta = record + format.meta_offset(side);
  for (int t = 0; t < 16; ++t) {
    store_meta(format.meta, meta, Arrangement::meta(groups, tb * 16 + t, g, 0), strip.scale_bits[t]);
    store_meta(format.meta, meta, Arrangement::meta(groups, tb * 16 + t, g, 1), strip.zero_bits[t]);
  }
  std::uint8_t* out = record + format.band_offset(side, group.band);
  for (int block = 0; block < channels / 16; ++block) {
    Block codes;
    (tokens ? quantize_block<true> : quantize_block<false>)(strip, block, levels, codes);
    put_block<Arrangement>(side, band, tb, (group.begin - band.begin) / 16 + block, codes, out);
  }
}

template <class Arrangement>
void pack_side(const RecordFormat& format, Side side, const SideSource& source, std::uint8_t* record) {
  const TensorFormat& tensor = format.side(side);
  std::memset(record + format.codes_offset(side), 0, tensor.code_bytes());
  for (int g = 0; g < tensor.num_groups(); ++g) {
    for (int tb = 0; tb < Lanes::kBlocks; ++tb) pack_strip<Arrangement>(format, side, source, g, tb, record);
  }
}

inline void flush_tile(const AppendArgs& a, int sequence, int head, int tile) {
  const CacheView& c = a.cache;
  std::uint8_t* record = c.record(sequence, tile, head);
  for (const Side side : kSides) {
    SideSource source{{}, c.dtype, a.clip_of(side), head, c.exponents_of(side, head)};
    const RowSource rows(a, side, sequence, head);
    for (int t = 0; t < kTileTokens; ++t) source.rows[t] = rows.at(c.num_sinks + tile * kTileTokens + t);
    visit_arrangement(c.format.arrangement, [&]<class A>() { pack_side<A>(c.format, side, source, record); });
  }
}

// New rows of one sequence and head into sinks and ring.
inline void store_rows(const AppendArgs& a, int sequence, int head) {
  const CacheView& c = a.cache;
  const int old_len = c.kv_len[sequence], new_len = old_len + a.tokens.length(sequence);
  const int bytes = c.head_dim * dtype_bytes(c.dtype);
  const int ring_first = ring_begin(new_len, c.num_sinks, c.ring_slots);
  for (const Side side : kSides) {
    const RowSource rows(a, side, sequence, head);
    for (int p = old_len; p < new_len; ++p) {
      const bool sink = p < c.num_sinks;
      if (!sink && p < ring_first) continue;
      const std::int64_t row = sink ? c.sink_row(sequence, p, head) : c.ring_row(sequence, p, head);
      void* base = sink ? (side == Side::kKey ? c.sink_k : c.sink_v) : (side == Side::kKey ? c.ring_k : c.ring_v);
      std::memcpy(const_cast<void*>(offset(base, row, c.dtype)), rows.at(p), bytes);
    }
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

// What a tile becomes before attention: floats for rows in full precision and for the exact kernel, scales and zeros
// for all packed tiles.
#pragma once

#include "core/softmax.h"
#include "core/window.h"
#include "cpu/decode_plan.h"
#include "cpu/tile.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// 64 tokens in a form that all segments share. Unquantized rows have no scale and zero.
struct TileValues {
  float* k;  // codes less their centre, [token block][channel][16 tokens]; or values, [token][channel]
  float* v;  // codes less their centre or values, [token][channel]
  float scale[2][kMaxGroups][kTileTokens];
  float zero[2][kMaxGroups][kTileTokens];
  bool quantized;
  bool finite;           // no NaN and no infinity among the values of V
  int first;             // position of token 0
  std::ptrdiff_t ahead;  // bytes from this record to the next one that is read; 0 for none
};

// Query rows rounded to multiples of a unit per row and group: unit * (128 * high + low), or unit * high alone.
struct QuantizedRows {
  std::int8_t* high;  // [rows][head_dim]
  std::int8_t* low;
  float* unit;  // [rows][kMaxGroups]
  float* sum;   // [rows][kMaxGroups]: of the rounded row over the group
};

// Rows of the query that share a KV head, with their softmax states.
struct RowBlock {
  int rows;
  float* q;          // [rows][head_dim]
  float* group_sum;  // [rows][kMaxGroups]: sum of q over the channels of each K group
  QuantizedRows q8;  // q for the integer kernel
  float* o;          // [rows][head_dim]
  SoftmaxState* state;
  TokenRange* seen;  // positions the row may see
  int* packed_end;   // first position the row reads in full precision after the sinks
  float* shift;
};

// Sum of q over the channels of each group.
inline void sum_groups(const TensorFormat& format, const float* q, float* sums) {
  for (int g = 0; g < format.num_groups(); ++g) {
    const Group group = format.group_at(g);
    sums[g] = 0.0f;
    for (int c = group.begin; c < group.end; ++c) sums[g] += q[c];
  }
}

// One scale or zero of 64 tokens, times `unit`.
template <class Arrangement, Meta M>
SKVQ_FN void decode_tokens(const std::uint8_t* meta, int groups, int group, int which, float unit, float* out) {
  if constexpr (M == Meta::kE4m3 && Arrangement::kind == ArrangementKind::kLanes) {
    for (int t = 0; t < kTileTokens; t += kVector) {
      store(out + t, load_e4m3(meta + Arrangement::meta(groups, t, group, which)) * unit);
    }
  } else {
    for (int t = 0; t < kTileTokens; ++t) {
      out[t] = decode_meta(M, load_meta(M, meta, Arrangement::meta(groups, t, group, which))) * unit;
    }
  }
}

// Scales and zeros of one side; false where a group holds a NaN. `centred`: codes will be read less their centre.
template <class Arrangement, Meta M>
bool load_meta_section(const RecordFormat& format, Side side, Exponents exponents, bool centred,
                       const std::uint8_t* record, TileValues& tile) {
  const TensorFormat& tensor = format.side(side);
  const int groups = tensor.num_groups();
  const std::uint8_t* meta = record + format.meta_offset(side);
  for (int line = 0; line < format.meta_section_bytes(side); line += 64) __builtin_prefetch(meta + tile.ahead + line);
  float nan[kTileTokens] = {};
  for (int g = 0; g < groups; ++g) {
    const float centre = centred ? code_centre(tensor.bands[tensor.group_at(g).band].code) : 0.0f;
    float* scale = tile.scale[static_cast<int>(side)][g];
    float* zero = tile.zero[static_cast<int>(side)][g];
    decode_tokens<Arrangement, M>(meta, groups, g, 0, power_of_two(exponents.scale), scale);
    decode_tokens<Arrangement, M>(meta, groups, g, 1, power_of_two(exponents.zero), zero);
    for (int t = 0; t < kTileTokens; ++t) {
      zero[t] += scale[t] * centre;
      nan[t] += scale[t] * 0.0f;
    }
  }
  Floats any = {};
  for (int t = 0; t < kTileTokens; t += kVector) any += load(nan + t);
  return sum(any) == 0.0f;
}

template <class Arrangement>
bool load_meta(const RecordFormat& format, Side side, Exponents exponents, bool centred, const std::uint8_t* record,
               TileValues& tile) {
  return format.meta == Meta::kE4m3
             ? load_meta_section<Arrangement, Meta::kE4m3>(format, side, exponents, centred, record, tile)
             : load_meta_section<Arrangement, Meta::kFp16>(format, side, exponents, centred, record, tile);
}

template <class Arrangement>
void load_floats(const CacheView& c, const std::uint8_t* record, int head, TileValues& tile) {
  for (const Side side : kSides) {
    const TensorFormat& tensor = c.format.side(side);
    tile.finite = load_meta<Arrangement>(c.format, side, c.exponents_of(side, head), true, record, tile);
    for (int b = 0; b < tensor.num_bands; ++b) {
      unpack_band<Arrangement>(side, tensor.bands[b], c.head_dim, record + c.format.band_offset(side, b),
                               side == Side::kKey ? tile.k : tile.v);
    }
  }
}

// A record as floats, for the exact kernel.
inline void load_record(const CacheView& c, const std::uint8_t* record, int head, TileValues& tile) {
  visit_arrangement(c.format.arrangement, [&]<class A>() { load_floats<A>(c, record, head, tile); });
}

// Scales and zeros alone, for the integer kernel; false where one of V is NaN.
inline bool load_scales(const CacheView& c, const std::uint8_t* record, int head, TileValues& tile) {
  load_meta<Lanes>(c.format, Side::kKey, c.exponents_of(Side::kKey, head), false, record, tile);
  tile.finite = load_meta<Lanes>(c.format, Side::kValue, c.exponents_of(Side::kValue, head), false, record, tile);
  // Weights are probabilities times the scale, so the zeros of V are needed in units of the scale.
  for (int g = 0; g < c.format.v.num_groups(); ++g) {
    for (int t = 0; t < kTileTokens; t += kVector) {
      store(tile.zero[1][g] + t, load(tile.zero[1][g] + t) / load(tile.scale[1][g] + t));
    }
  }
  return tile.finite;
}

// Rows [first, end) of sinks or ring; what lies beyond is zero and masked.
inline void load_rows(const CacheView& c, int sequence, int head, bool sinks, int first, int end, TileValues& tile) {
  Floats nan = {};
  for (int t = 0; t < kTileTokens; ++t) {
    const int p = first + t;
    float* k = tile.k + t * c.head_dim;
    float* v = tile.v + t * c.head_dim;
    if (p >= end) {
      std::memset(k, 0, c.head_dim * sizeof(float));
      std::memset(v, 0, c.head_dim * sizeof(float));
      continue;
    }
    const std::int64_t row = sinks ? c.sink_row(sequence, p, head) : c.ring_row(sequence, p, head);
    load_floats(c.dtype, sinks ? c.sink_k : c.ring_k, row, c.head_dim, k);
    load_floats(c.dtype, sinks ? c.sink_v : c.ring_v, row, c.head_dim, v);
    for (int ch = 0; ch < c.head_dim; ch += kVector) nan += load(v + ch) * 0.0f;
  }
  tile.finite = sum(nan) == 0.0f;
  tile.first = first;
  tile.quantized = false;
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

// Scales and zeros of a tile, and the rows of the query that it is attended with.
#pragma once

#include "core/softmax.h"
#include "core/window.h"
#include "cpu/decode_plan.h"
#include "cpu/tile.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// What the format says about one side of a record, worked out once for many tiles.
struct SideLayout {
  int num_groups;
  Group groups[kMaxGroups];
  int band_offset[kMaxBands], meta_offset;  // bytes into the record
  float scale_unit, zero_unit;
};

// A packed tile as the kernels see it: the codes where they lie, in arrangement `lanes`, and scales and zeros as
// floats.
struct PackedTile {
  SideLayout layout[2];
  const std::uint8_t* codes[2][kMaxBands];
  Code code[2][kMaxBands];  // as the bytes are now
  std::ptrdiff_t ahead;     // bytes from this record to the next one that is read; 0 for none
  bool finite;              // no NaN among scales and zeros of V
  float scale[2][kMaxGroups][kTileTokens];
  float zero[2][kMaxGroups][kTileTokens];
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
  float* o;          // [rows][head_dim]: sums of probabilities times values, less what `zeros` holds
  float* zeros;      // [rows][kMaxGroups]: sums of probabilities times zeros, the same for all channels of a V group
  SoftmaxState* state;
  TokenRange* seen;  // positions the row may see
  int* packed_end;   // first position the row reads in full precision after the sinks
  float* shift;
};

inline SideLayout layout_of(const CacheView& c, Side side, int head) {
  const TensorFormat& tensor = c.format.side(side);
  const Exponents exponents = c.exponents_of(side, head);
  SideLayout layout{};
  layout.num_groups = tensor.num_groups();
  for (int g = 0; g < layout.num_groups; ++g) layout.groups[g] = tensor.group_at(g);
  for (int b = 0; b < tensor.num_bands; ++b) layout.band_offset[b] = c.format.band_offset(side, b);
  layout.meta_offset = c.format.meta_offset(side);
  layout.scale_unit = power_of_two(exponents.scale);
  layout.zero_unit = power_of_two(exponents.zero);
  return layout;
}

// Sum of q over the channels of each group.
inline void sum_groups(const SideLayout& layout, const float* q, float* sums) {
  for (int g = 0; g < layout.num_groups; ++g) {
    Floats lanes = {};
    for (int c = layout.groups[g].begin; c < layout.groups[g].end; c += kVector) lanes += load(q + c);
    sums[g] = sum(lanes);
  }
}

// One scale or zero of 64 tokens, times `unit`. Returns whether a NaN is among them.
template <Meta M>
SKVQ_FN bool decode_tokens(const std::uint8_t* meta, int first, float unit, float* out) {
  if constexpr (M == Meta::kE4m3) {
    const bool low = load_e4m3(meta + first, unit, out), high = load_e4m3(meta + first + 32, unit, out + 32);
    if (!low && !high) [[likely]]
      return false;
    for (int t = 0; t < kTileTokens; ++t) out[t] = e4m3_to_float(meta[first + t]) * unit;
    return true;
  } else {
    Floats nan = {};
    for (int t = 0; t < kTileTokens; t += kVector) {
      const Floats value = load_as<DType::kF16>(meta, first + t) * unit;
      nan += value * 0.0f;
      store(out + t, value);
    }
    return sum(nan) != 0.0f;
  }
}

// Returns whether a scale or a zero is NaN.
template <Meta M>
bool load_meta_section(Side side, const std::uint8_t* record, PackedTile& tile) {
  const int s = static_cast<int>(side);
  const SideLayout& layout = tile.layout[s];
  const std::uint8_t* meta = record + layout.meta_offset;
  const int bytes = 2 * layout.num_groups * kTileTokens * meta_bytes(M);
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(meta + tile.ahead + line);
  bool nan = false;
  for (int g = 0; g < layout.num_groups; ++g) {
    nan |= decode_tokens<M>(meta, Lanes::meta(layout.num_groups, 0, g, 0), layout.scale_unit, tile.scale[s][g]);
    nan |= decode_tokens<M>(meta, Lanes::meta(layout.num_groups, 0, g, 1), layout.zero_unit, tile.zero[s][g]);
  }
  return nan;
}

// Scales and zeros of a record in arrangement `lanes`.
inline void load_tile_meta(Meta meta, const std::uint8_t* record, PackedTile& tile) {
  const auto load = meta == Meta::kE4m3 ? load_meta_section<Meta::kE4m3> : load_meta_section<Meta::kFp16>;
  load(Side::kKey, record, tile);
  tile.finite = !load(Side::kValue, record, tile);
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

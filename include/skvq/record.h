// A record: the packed bytes of one page (64 tokens) of one KV head, [K codes | K meta | V codes | V meta].
#pragma once

#include "skvq/arrangement.h"

namespace skvq {

struct RecordFormat {
  TensorFormat k, v;
  Meta meta = Meta::kE4m3;
  ArrangementKind arrangement = ArrangementKind::kLanes;

  SKVQ_FN constexpr const TensorFormat& side(Side s) const { return s == Side::kKey ? k : v; }

  SKVQ_FN constexpr int section_bytes(Side s) const { return side(s).code_bytes() + meta_section_bytes(s); }
  SKVQ_FN constexpr int meta_section_bytes(Side s) const {
    return 2 * side(s).num_groups() * kTileTokens * meta_bytes(meta);
  }
  SKVQ_FN constexpr int codes_offset(Side s) const { return s == Side::kKey ? 0 : section_bytes(Side::kKey); }
  SKVQ_FN constexpr int band_offset(Side s, int band) const {
    int offset = codes_offset(s);
    for (int b = 0; b < band; ++b) offset += tile_code_bytes(side(s).bands[b].code, side(s).bands[b].channels);
    return offset;
  }
  SKVQ_FN constexpr int meta_offset(Side s) const { return codes_offset(s) + side(s).code_bytes(); }
  SKVQ_FN constexpr int record_bytes() const { return section_bytes(Side::kKey) + section_bytes(Side::kValue); }
};

}  // namespace skvq

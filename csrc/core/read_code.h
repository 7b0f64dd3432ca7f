// One code of a tile, wherever its arrangement keeps it.
#pragma once

#include "skvq/arrangement.h"

namespace skvq {

// `in`: the codes of the band; `channel` counts from its first one.
template <class Arrangement>
SKVQ_FN int read_code(Side side, const Band& band, const std::uint8_t* in, int token, int channel) {
  if (is_base3(band.code)) {
    const Slot slot = Arrangement::trit(band.channels, token, channel);
    return Arrangement::from_byte(in[slot.byte]) / power_of_three(slot.shift) % 3;
  }
  const CodeTraits code = traits(band.code);
  int value = 0, low = 0;
  for (const int width : code.plane_bits) {
    if (width == 0) continue;
    const Slot slot = Arrangement::bits(side, width, band.channels, token, channel);
    value |= (in[slot.byte] >> slot.shift & ((1 << width) - 1)) << low;
    in += band.channels * kTileTokens * width / 8;
    low += width;
  }
  return value;
}

}  // namespace skvq

// Where the codes of a group lie that starts and ends at bytes: rows of a plain matrix, groups of any size.
#pragma once

#include "skvq/format.h"

namespace skvq {

// Calls visit(byte, shift_or_digit, low, width) for every stored part of code `i` of a group of n codes: bits `low` to
// low + width - 1 from bit `shift` on, or, with width 0, a trit times `digit`.
template <class F>
SKVQ_FN void each_part(Code code, int n, int i, F&& visit) {
  if (is_base3(code)) {
    visit(i / kTritsPerByte, power_of_three(i % kTritsPerByte), 0, 0);
    return;
  }
  int plane = 0, low = 0;
  for (const int width : traits(code).plane_bits) {
    if (width == 0) continue;
    visit(plane + i * width / 8, i * width % 8, low, width);
    plane += (n * width + 7) / 8;
    low += width;
  }
}

// Adjacent codes that fill whole bytes, in every plane: no other codes are in these.
SKVQ_FN constexpr int codes_in_whole_bytes(Code code) {
  return is_base3(code) ? kTritsPerByte : 8;
}

}  // namespace skvq

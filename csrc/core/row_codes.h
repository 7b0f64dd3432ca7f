// Rows of a plain matrix, groups of any size: where the codes of a group lie that starts and ends at bytes, and which
// of its clip ratios a group takes.
#pragma once

#include "core/quantize.h"
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

// The quantizer of a group: of its clip ratios the first that errs least. Args: make, from a ratio; error_of, the sum
// of squared_error of the group.
template <class Make, class ErrorOf>
SKVQ_FN GroupQuantizer fit_quantizer(const QuantizeRowsArgs& a, int group, Make make, ErrorOf error_of) {
  if (a.clip.ratios == nullptr) return make(1.0f);
  const float* choices = a.clip.of(0, a.num_groups, group);
  GroupQuantizer best = make(choices[0]);
  if (a.clip.choices == 1) return best;
  std::uint32_t least = error_of(best);
  for (int c = 1; c < a.clip.choices; ++c) {
    const GroupQuantizer q = make(choices[c]);
    const std::uint32_t error = error_of(q);
    if (error >= least) continue;
    best = q;
    least = error;
  }
  return best;
}

}  // namespace skvq

// The quantizer of one group of one token: asymmetric, uniform, dynamic (SKVQ section 3; clipping after group
// minimum and maximum). Two points where the published code loses accuracy are done otherwise here: codes are
// computed against the *rounded* scale and zero, and the clip shrinks the range about its midpoint, so that it
// is right for groups that do not straddle zero.
//
// Compile what includes this without contraction to fused multiply-adds: codes must agree in every bit between
// CPU, CUDA and the reference.
#pragma once

#include <math.h>

#include "core/minifloat.h"

namespace skvq {

struct GroupQuantizer {
  float zero;     // decoded
  float scale;    // decoded, never 0
  float inverse;  // 1 / scale
  std::uint16_t scale_bits, zero_bits;
};

// `finite` is false where the group holds a NaN or an infinity: it is then stored as NaN and reads back as NaN,
// as it would in full precision; no other group, token or sequence is touched.
SKVQ_FN GroupQuantizer make_group_quantizer(float low, float high, bool finite, float clip, int levels, Meta meta,
                                            Exponents exponents) {
  // Of the two zeros either may have been found as the minimum; adding 0 makes it the positive one.
  const float middle = 0.5f * low + 0.5f * high + 0.0f;
  const float half = (0.5f * high - 0.5f * low) * clip;
  GroupQuantizer g;
  g.zero_bits = encode_meta(meta, finite ? (middle - half) * power_of_two(-exponents.zero) : quiet_nan());
  g.zero = decode_meta(meta, g.zero_bits) * power_of_two(exponents.zero);
  // The step runs from the rounded zero to the wanted top, which costs nothing and leaves no gap at the top.
  const float step = ((middle + half) - g.zero) / static_cast<float>(levels - 1);
  g.scale_bits = encode_meta(meta, finite ? (step > 0.0f ? step : 0.0f) * power_of_two(-exponents.scale) : quiet_nan());
  g.scale_bits = g.scale_bits == 0 ? std::uint16_t{1} : g.scale_bits;  // smallest positive value
  g.scale = decode_meta(meta, g.scale_bits) * power_of_two(exponents.scale);
  g.inverse = 1.0f / g.scale;
  return g;
}

// 0 for a NaN. Each compiler finds the instructions for minimum and maximum in one form only.
SKVQ_FN float clamp(float x, float top) {
#if defined(__CUDACC__)
  return ::fminf(::fmaxf(x, 0.0f), top);
#else
  const float t = x > 0.0f ? x : 0.0f;
  return t < top ? t : top;
#endif
}

// Clamp, then round half to even; the code is in the lowest 9 bits. A NaN gives 0.
SKVQ_FN std::uint32_t quantize_bits(float x, const GroupQuantizer& g, int levels) {
  // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
  return float_bits(clamp((x - g.zero) * g.inverse, static_cast<float>(levels - 1)) + 12582912.0f);
}
SKVQ_FN int quantize(float x, const GroupQuantizer& g, int levels) {
  return static_cast<int>(quantize_bits(x, g, levels) & 0x1ffu);
}

// Errors are counted in whole parts of a group's range: sums then do not depend on their order, and every backend
// finds the same clip ratio best. The parts are few enough for groups of 4096 channels.
inline constexpr float kErrorParts = 1023.0f;
inline constexpr int kMaxSearchedChannels = 4096;

// Parts per unit of x; infinite for a group without a range, which all ratios fit equally.
SKVQ_FN float error_parts(float low, float high) {
  return 0.5f * kErrorParts / (0.5f * high - 0.5f * low);
}
SKVQ_FN std::uint32_t squared_error(float x, const GroupQuantizer& g, int levels, float parts) {
  const float back = static_cast<float>(quantize(x, g, levels)) * g.scale + g.zero;
  const float off = bits_float(float_bits((x - back) * parts) & 0x7fffffffu);
  const std::uint32_t whole = float_bits(clamp(off, kErrorParts) + 12582912.0f) & 0x3ffu;
  return whole * whole;
}

}  // namespace skvq

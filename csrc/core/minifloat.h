// E4M3, fp16 and bf16 by bit arithmetic: one rounding (to nearest, ties to even) for every backend, free of
// branches so that loops over it vectorize.
#pragma once

#include <cstdint>

#include "skvq/cache.h"

namespace skvq {

SKVQ_FN std::uint32_t float_bits(float x) {
  std::uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}
SKVQ_FN float bits_float(std::uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}
SKVQ_FN float power_of_two(int exponent) {
  return bits_float(static_cast<std::uint32_t>(127 + exponent) << 23);
}
SKVQ_FN float quiet_nan() {
  return bits_float(0x7fc00000u);
}

// Saturates at +-448; NaN stays NaN. Conversion as in OCP "8-bit floating point", E4M3.
SKVQ_FN std::uint8_t float_to_e4m3(float x) {
  const std::uint32_t u = float_bits(x);
  const std::uint32_t sign = (u >> 24) & 0x80u;
  std::uint32_t magnitude = u & 0x7fffffffu;
  const bool nan = magnitude > 0x7f800000u;
  const std::uint32_t max = 0x43e00000u;  // 448
  magnitude = magnitude > max ? max : magnitude;
  const std::uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  // Below 2^-6 the step is 2^-9: adding 1.5 * 2^14 leaves the rounded multiple in the low bits.
  const std::uint32_t subnormal = float_bits(bits_float(magnitude) + 24576.0f) - float_bits(24576.0f);
  const std::uint32_t code = magnitude < 0x3c800000u ? subnormal : normal;
  return static_cast<std::uint8_t>(sign | (nan ? 0x7fu : code));
}

SKVQ_FN float e4m3_to_float(std::uint8_t byte) {
  const std::uint32_t magnitude = byte & 0x7fu;
  const std::uint32_t sign = static_cast<std::uint32_t>(byte & 0x80u) << 24;
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-9f;
  const float normal = bits_float((magnitude << 20) + (120u << 23));
  const float value = magnitude < 8u ? subnormal : normal;
  return bits_float(sign | (magnitude == 0x7fu ? 0x7fc00000u : float_bits(value)));
}

SKVQ_FN float half_to_float(std::uint16_t h) {
  const std::uint32_t w = static_cast<std::uint32_t>(h) << 16;
  const std::uint32_t twice = w + w;
  const float normal = bits_float((twice >> 4) + (0xe0u << 23)) * 0x1p-112f;
  const float subnormal = bits_float((twice >> 17) | (126u << 23)) - 0.5f;
  return bits_float((w & 0x80000000u) | float_bits(twice < (1u << 27) ? subnormal : normal));
}

SKVQ_FN std::uint16_t float_to_half(float x) {
  const std::uint32_t u = float_bits(x);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t magnitude = u & 0x7fffffffu;
  const std::uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14 the step is 2^-24: adding 0.5 leaves the rounded multiple in the low bits.
  const std::uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  std::uint32_t code = magnitude < 0x38800000u ? subnormal : normal;
  code = magnitude >= 0x477ff000u ? 0x7c00u : code;
  code = magnitude > 0x7f800000u ? 0x7e00u : code;
  return static_cast<std::uint16_t>(sign | code);
}

SKVQ_FN float bf16_to_float(std::uint16_t b) {
  return bits_float(static_cast<std::uint32_t>(b) << 16);
}

SKVQ_FN std::uint16_t float_to_bf16(float x) {
  const std::uint32_t u = float_bits(x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

SKVQ_FN float load_float(DType dtype, const void* data, std::int64_t index) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(data)[index];
    case DType::kF16:
      return half_to_float(static_cast<const std::uint16_t*>(data)[index]);
    case DType::kBf16:
      return bf16_to_float(static_cast<const std::uint16_t*>(data)[index]);
  }
  return quiet_nan();
}

SKVQ_FN void store_float(DType dtype, void* data, std::int64_t index, float x) {
  switch (dtype) {
    case DType::kF32:
      static_cast<float*>(data)[index] = x;
      break;
    case DType::kF16:
      static_cast<std::uint16_t*>(data)[index] = float_to_half(x);
      break;
    case DType::kBf16:
      static_cast<std::uint16_t*>(data)[index] = float_to_bf16(x);
      break;
  }
}

// Scale and zero as they are stored; finite values saturate.
SKVQ_FN std::uint16_t encode_meta(Meta meta, float x) {
  if (meta == Meta::kE4m3) return float_to_e4m3(x);
  x = x > 65504.0f ? 65504.0f : x;
  return float_to_half(x < -65504.0f ? -65504.0f : x);
}
SKVQ_FN float decode_meta(Meta meta, std::uint16_t bits) {
  return meta == Meta::kE4m3 ? e4m3_to_float(static_cast<std::uint8_t>(bits)) : half_to_float(bits);
}
SKVQ_FN void store_meta(Meta meta, void* section, std::int64_t index, std::uint16_t bits) {
  if (meta == Meta::kE4m3) {
    static_cast<std::uint8_t*>(section)[index] = static_cast<std::uint8_t>(bits);
  } else {
    static_cast<std::uint16_t*>(section)[index] = bits;
  }
}
SKVQ_FN std::uint16_t load_meta(Meta meta, const void* section, std::int64_t index) {
  return meta == Meta::kE4m3 ? static_cast<const std::uint8_t*>(section)[index]
                             : static_cast<const std::uint16_t*>(section)[index];
}

}  // namespace skvq

// Vectors of floats as wide as the registers of the instruction set. One source serves AVX-512, AVX2, SSE and NEON.
#pragma once

#include <cstdint>

#include "core/minifloat.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Kernel headers are compiled once per instruction set, each time into a namespace of its own, so that the linker
// can never take one set's copy of a function for another's.
#ifndef SKVQ_ISA
#define SKVQ_ISA portable
#endif

namespace skvq::cpu {
inline namespace SKVQ_ISA {

#if defined(__AVX512F__)
inline constexpr int kVector = 16;
#elif defined(__AVX2__)
inline constexpr int kVector = 8;
#else
inline constexpr int kVector = 4;
#endif

using Floats = float __attribute__((vector_size(4 * kVector), aligned(4), may_alias));
using Ints = std::int32_t __attribute__((vector_size(4 * kVector), aligned(4), may_alias));

SKVQ_FN Floats splat(float x) {
  return Floats{} + x;
}
SKVQ_FN Floats load(const float* p) {
  return *reinterpret_cast<const Floats*>(p);
}
SKVQ_FN void store(float* p, Floats v) {
  *reinterpret_cast<Floats*>(p) = v;
}

SKVQ_FN Ints lane_index() {
#if defined(__AVX512F__)
  return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return Ints{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return Ints{0, 1, 2, 3};
#endif
}

// Bytes as integers: compilers take this apart lane by lane where they are not told the instruction.
SKVQ_FN Ints load_bytes(const std::uint8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  Ints v;
  for (int i = 0; i < kVector; ++i) v[i] = p[i];
  return v;
#endif
}

// `count` numbers of any float type as fp32.
SKVQ_FN void load_floats(DType dtype, const void* data, std::int64_t first, int count, float* out) {
  switch (dtype) {
    case DType::kF32:
      for (int i = 0; i < count; ++i) out[i] = load_float(DType::kF32, data, first + i);
      break;
    case DType::kF16:
      for (int i = 0; i < count; ++i) out[i] = load_float(DType::kF16, data, first + i);
      break;
    case DType::kBf16:
      for (int i = 0; i < count; ++i) out[i] = load_float(DType::kBf16, data, first + i);
      break;
  }
}

// Sum and maximum over lanes, by halves. A NaN in `largest` loses to any number.
SKVQ_FN float sum(Floats v) {
  for (int distance = kVector / 2; distance > 0; distance /= 2) v += __builtin_shuffle(v, lane_index() ^ distance);
  return v[0];
}
SKVQ_FN float largest(Floats v) {
  for (int distance = kVector / 2; distance > 0; distance /= 2) {
    const Floats other = __builtin_shuffle(v, lane_index() ^ distance);
    v = other > v ? other : v;
  }
  return v[0];
}

// E4M3 numbers; equal to e4m3_to_float.
SKVQ_FN Floats load_e4m3(const std::uint8_t* p) {
  const Ints byte = load_bytes(p), magnitude = byte & 0x7f;
  const Floats subnormal = __builtin_convertvector(magnitude, Floats) * 0x1p-9f;
  const Floats normal = reinterpret_cast<Floats>((magnitude << 20) + (120 << 23));
  const Ints bits = reinterpret_cast<Ints>(magnitude < 8 ? subnormal : normal) | (byte & 0x80) << 24;
  return reinterpret_cast<Floats>(magnitude == 0x7f ? Ints{} + 0x7fc00000 : bits);
}

// exp(x) for x <= 0 or NaN, relative error about 1e-7. Values under 2^-126 become 0.
SKVQ_FN Floats exp_nonpositive(Floats x) {
  const Floats y = x * 1.44269504088896341f;
  const Floats rounded = (y + 12582912.0f) - 12582912.0f;
  // x - rounded * ln 2 in two parts keeps the relative error small for large |x|.
  const Floats r = (x - rounded * 0.693359375f) + rounded * 2.12194440e-4f;
  Floats p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints exponent = __builtin_convertvector(rounded < -126.0f ? splat(-126.0f) : rounded, Ints);
  const Floats power = reinterpret_cast<Floats>((exponent + 127) << 23);
  const Floats value = p * power;
  return rounded < -126.0f ? Floats{} : value;
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

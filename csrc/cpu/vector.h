// Sixteen floats at a time. The compiler lowers them to AVX-512, AVX2, SSE or NEON registers, so one source
// serves every instruction set.
#pragma once

#include <cstdint>

#include "core/minifloat.h"

// Kernel headers are compiled once per instruction set, each time into a namespace of its own, so that the linker
// can never take one set's copy of a function for another's.
#ifndef SKVQ_ISA
#define SKVQ_ISA portable
#endif

namespace skvq::cpu {

using Float16 = float __attribute__((vector_size(64), aligned(4), may_alias));
using Int16 = std::int32_t __attribute__((vector_size(64), aligned(4), may_alias));
inline constexpr int kVector = 16;

SKVQ_FN Float16 splat(float x) {
  return Float16{} + x;
}
SKVQ_FN Float16 load(const float* p) {
  return *reinterpret_cast<const Float16*>(p);
}
SKVQ_FN void store(float* p, Float16 v) {
  *reinterpret_cast<Float16*>(p) = v;
}

SKVQ_FN float sum(Float16 v) {
  float s = 0.0f;
  for (int i = 0; i < kVector; ++i) s += v[i];
  return s;
}

// exp(x) for x <= 0 or NaN, relative error about 1e-7. Values under 2^-126 become 0.
SKVQ_FN Float16 exp_nonpositive(Float16 x) {
  const Float16 y = x * 1.44269504088896341f;
  const Float16 rounded = (y + 12582912.0f) - 12582912.0f;
  // x - rounded * ln 2 in two parts keeps the relative error small for large |x|.
  const Float16 r = (x - rounded * 0.693359375f) + rounded * 2.12194440e-4f;
  Float16 p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Int16 exponent = __builtin_convertvector(rounded < -126.0f ? splat(-126.0f) : rounded, Int16);
  const Float16 power = reinterpret_cast<Float16>((exponent + 127) << 23);
  const Float16 value = p * power;
  return rounded < -126.0f ? Float16{} : value;
}

}  // namespace skvq::cpu

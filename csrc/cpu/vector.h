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
SKVQ_FN Ints load_words(const std::uint8_t* p) {
  return *reinterpret_cast<const Ints*>(p);
}
SKVQ_FN Floats to_floats(Ints v) {
  return __builtin_convertvector(v, Floats);
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

// kVector numbers of a float type as fp32; equal to load_float. Compilers take conversions apart lane by lane where
// they are not told the instruction.
template <DType D>
SKVQ_FN Floats load_as(const void* data, std::int64_t first) {
  if constexpr (D == DType::kF32) return load(static_cast<const float*>(data) + first);
  [[maybe_unused]] const std::uint16_t* halves = static_cast<const std::uint16_t*>(data) + first;
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
  if constexpr (D == DType::kF16) return (Floats)_mm512_cvtph_ps(bits);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves));
  if constexpr (D == DType::kF16) return (Floats)_mm256_cvtph_ps(bits);
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  Floats v;
  for (int i = 0; i < kVector; ++i) v[i] = load_float(D, halves, i);
  return v;
#endif
}

// Calls visit.template operator()<D>() for the type at hand.
template <class F>
SKVQ_FN void with_dtype(DType dtype, F&& visit) {
  switch (dtype) {
    case DType::kF32:
      return visit.template operator()<DType::kF32>();
    case DType::kF16:
      return visit.template operator()<DType::kF16>();
    case DType::kBf16:
      return visit.template operator()<DType::kBf16>();
  }
}

// `count` numbers of any float type as fp32, a multiple of 16.
SKVQ_FN void load_floats(DType dtype, const void* data, std::int64_t first, int count, float* out) {
  with_dtype(dtype, [&]<DType D>() {
    for (int i = 0; i < count; i += kVector) store(out + i, load_as<D>(data, first + i));
  });
}

// Sum and maximum over lanes. The sum goes through blocks of four lanes first, in the order of `sum_four`: a row must
// not depend on how many others go with it. A NaN in `largest` loses to any number.
SKVQ_FN float sum(Floats v) {
  for (int distance = 2; distance > 0; distance /= 2) v += __builtin_shuffle(v, lane_index() ^ distance);
  for (int distance = kVector / 2; distance >= 4; distance /= 2) v += __builtin_shuffle(v, lane_index() ^ distance);
  return v[0];
}
// Sums over the lanes of four vectors, for little more than one takes alone.
SKVQ_FN void sum_four(const Floats (&v)[4], float (&out)[4]) {
  // Steps of a transposition inside each block of four lanes, with an addition after each.
  const Ints i = lane_index(), block = i / 4 * 4, half = i % 4 / 2;
  const Ints low = block + half + i % 2 * kVector, high = low + 2;
  const Floats ab = __builtin_shuffle(v[0], v[1], low) + __builtin_shuffle(v[0], v[1], high);
  const Floats cd = __builtin_shuffle(v[2], v[3], low) + __builtin_shuffle(v[2], v[3], high);
  const Ints first = block + i % 2 + half * kVector, second = first + 2;
  Floats sums = __builtin_shuffle(ab, cd, first) + __builtin_shuffle(ab, cd, second);
  for (int distance = kVector / 2; distance >= 4; distance /= 2) sums += __builtin_shuffle(sums, i ^ distance);
  for (int n = 0; n < 4; ++n) out[n] = sums[n];
}
template <int R>
SKVQ_FN void sum_rows(const Floats (&v)[R], float (&out)[R]) {
  if constexpr (R == 4) return sum_four(v, out);
  for (int r = 0; r < R; ++r) out[r] = sum(v[r]);
}
SKVQ_FN float largest(Floats v) {
  for (int distance = kVector / 2; distance > 0; distance /= 2) {
    const Floats other = __builtin_shuffle(v, lane_index() ^ distance);
    v = other > v ? other : v;
  }
  return v[0];
}

// Swaps bit D of the number of a lane with the number of its vector, a before b: a step of a transposition.
template <int D>
SKVQ_FN void exchange(Floats& a, Floats& b) {
  const Ints i = lane_index(), second = i / D % 2;
  const Floats low = __builtin_shuffle(a, b, i + second * (kVector - D));
  b = __builtin_shuffle(a, b, i + D + second * (kVector - D));
  a = low;
}
template <int D = 1>
SKVQ_FN void transpose(Floats (&v)[kVector]) {
#pragma GCC unroll 16
  for (int r = 0; r < kVector; ++r) {
    if (r / D % 2 == 0) exchange<D>(v[r], v[r + D]);
  }
  if constexpr (2 * D < kVector) transpose<2 * D>(v);
}

// Minimum and maximum, lane by lane; `nan` stays 0 while all is finite.
struct Extent {
  Floats low, high, nan;

  SKVQ_FN static Extent of_nothing() { return {splat(__builtin_inff()), splat(-__builtin_inff()), Floats{}}; }
  SKVQ_FN void add(const Extent& e) {
    low = e.low < low ? e.low : low;
    high = e.high > high ? e.high : high;
    nan *= e.nan;
  }
  SKVQ_FN void add(Floats x) { add({x, x, x}); }
};

// Extents over the lanes of kVector of them: lane i has that of the i-th.
template <int D = kVector / 2>
SKVQ_FN Extent extents(Extent (&e)[kVector]) {
#pragma GCC unroll 16
  for (int r = 0; r < D; ++r) {
    Extent &a = e[r], &b = e[r + D];
    exchange<D>(a.low, b.low);
    exchange<D>(a.high, b.high);
    exchange<D>(a.nan, b.nan);
    a.add(b);
  }
  if constexpr (D > 1) return extents<D / 2>(e);
  return e[0];
}

// 32 E4M3 numbers, times `unit`; equal to e4m3_to_float but for NaN, which becomes a number. Returns whether there is
// one.
SKVQ_FN bool load_e4m3(const std::uint8_t* p, float unit, float* out) {
#if defined(__AVX2__)
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), zero = _mm256_setzero_si256();
  // An E4M3 number is an fp16 number of the same digits, 256 times too small; fp16 conversion knows subnormals. With
  // the byte on top of 16 bits, an arithmetic shift makes room for the longer exponent behind the sign.
  const __m256 scale = _mm256_set1_ps(unit * 256.0f);
  const auto put = [&](__m256i top, int at) {
    const __m256i half = _mm256_and_si256(_mm256_srai_epi16(top, 1), _mm256_set1_epi16(-0x4001));
    _mm256_storeu_ps(out + at, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), scale));
    _mm256_storeu_ps(out + at + 16, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), scale));
  };
  put(_mm256_unpacklo_epi8(zero, bytes), 0);
  put(_mm256_unpackhi_epi8(zero, bytes), 8);
  const __m256i most = _mm256_set1_epi8(0x7f);
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, most), most)) != 0;
#else
  bool nan = false;
  for (int i = 0; i < 32; ++i) {
    out[i] = e4m3_to_float(p[i]) * unit;
    nan |= (p[i] & 0x7f) == 0x7f;
  }
  return nan;
#endif
}

// Added to a number under 2^22 it leaves the nearest integer in the low bits, and taken away again that integer.
inline constexpr float kRounder = 12582912.0f;

// exp(x) for x <= 0 or NaN, relative error about 1e-7 near 0 and 1e-7 * |x| far from it. Values under 2^-126 become 0.
SKVQ_FN Floats exp_nonpositive(Floats x) {
  const Floats y = x * 1.44269504088896341f, smallest = splat(-126.0f);
  const Floats kept = smallest > y ? smallest : y;  // in this order a NaN is kept
  const Floats shifted = kept + kRounder, f = kept - (shifted - kRounder);
  // 2^f on [-1/2, 1/2], minimax of degree 6.
  Floats p = splat(1.53533620e-04f);
  p = p * f + 1.33988750e-03f;
  p = p * f + 9.61843692e-03f;
  p = p * f + 5.55033237e-02f;
  p = p * f + 2.40226477e-01f;
  p = p * f + 6.93147182e-01f;
  p = p * f + 1.0f;
  const Ints power = (reinterpret_cast<Ints>(shifted) << 23) + (127 << 23);
  return y < smallest ? Floats{} : p * reinterpret_cast<Floats>(power);
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

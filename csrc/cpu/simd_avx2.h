// AVX2: pairs of 256-bit registers, 16-bit sums of byte products. Eight-bit codes would overflow those sums and take
// the floating-point kernel.
#pragma once

#include <cstring>

#include "cpu/tile.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace skvq::cpu {
inline namespace SKVQ_ISA {

struct Simd {
  struct Codes {
    __m256i half[2];
  };
  using Sum = Codes;

  static constexpr bool supports(Code code) { return traits(code).levels <= 16; }

  SKVQ_FN static Sum zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  SKVQ_FN static Sum add(Sum a, Sum b) {
    return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
  }
  SKVQ_FN static void to_float(Sum s, Floats (&lanes)[2]) {
    for (int h = 0; h < 2; ++h) lanes[h] = (Floats)_mm256_cvtepi32_ps(s.half[h]);
  }

  // The low byte of each lane; lanes lie in -128 to 127.
  SKVQ_FN static void store_bytes(std::int8_t* out, Ints v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
  }

  SKVQ_FN static __m256i load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

  // 0xFF in the bytes whose bit is set.
  SKVQ_FN static __m256i bytes_of(std::uint32_t mask) {
    const __m256i spread =
        _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(mask)),
                            _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
    return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
  }

  template <Code C>
  SKVQ_FN static void block(const std::uint8_t* low, const std::uint8_t* high, Codes (&codes)[4]) {
    constexpr int kWidth = traits(C).plane_bits[0];
    constexpr int kQuads = 8 / kWidth;
    const __m256i field = _mm256_set1_epi8((1 << kWidth) - 1);
    for (int q = 0; q < 4; ++q) {
      for (int h = 0; h < 2; ++h) {
        const __m256i words = load(low + q / kQuads * 64 + h * 32);
        codes[q].half[h] = _mm256_and_si256(_mm256_srli_epi32(words, kWidth * (q % kQuads)), field);
        if constexpr (traits(C).plane_bits[1] == 1) {
          std::uint32_t mask;
          std::memcpy(&mask, high + q * 8 + h * 4, sizeof mask);
          const __m256i bit = _mm256_and_si256(bytes_of(mask), _mm256_set1_epi8(1 << kWidth));
          codes[q].half[h] = _mm256_or_si256(codes[q].half[h], bit);
        }
      }
    }
  }

  // Every byte divided by 3: n * 171 >> 9 in 16-bit lanes.
  SKVQ_FN static __m256i third(__m256i v) {
    const __m256i factor = _mm256_set1_epi16(171);
    const __m256i even = _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_and_si256(v, _mm256_set1_epi16(0xff)), factor), 9);
    const __m256i odd = _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_srli_epi16(v, 8), factor), 9);
    return _mm256_or_si256(even, _mm256_slli_epi16(odd, 8));
  }

  SKVQ_FN static void ternary_blocks(const std::uint8_t* in, Codes (&codes)[16]) {
    for (int word = 0; word < 3; ++word) {
      for (int h = 0; h < 2; ++h) {
        __m256i rest = load(in + word * 64 + h * 32);
        for (int digit = 0; digit < kTritsPerByte; ++digit) {
          const __m256i next = third(rest);
          codes[3 * digit + word].half[h] = _mm256_sub_epi8(rest, _mm256_add_epi8(next, _mm256_add_epi8(next, next)));
          rest = next;
        }
      }
    }
    std::uint8_t last[64];
    for (int lane = 0; lane < 16; ++lane) {
      int rest = in[192 + lane];
      for (int byte = 0; byte < 4; ++byte, rest /= 3) last[lane * 4 + byte] = static_cast<std::uint8_t>(rest % 3);
    }
    codes[15] = {{load(last), load(last + 32)}};
  }

  SKVQ_FN static Sum dot(Sum sum, const Codes (&codes)[4], const std::int8_t* coefficients) {
    using Quad [[gnu::may_alias, gnu::aligned(4)]] = std::int32_t;  // one load each: the broadcast then costs nothing
    const Quad* quads = reinterpret_cast<const Quad*>(coefficients);
    for (int h = 0; h < 2; ++h) {
      __m256i pairs = _mm256_setzero_si256();
      for (int q = 0; q < 4; ++q) {
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes[q].half[h], _mm256_set1_epi32(quads[q])));
      }
      sum.half[h] = _mm256_add_epi32(sum.half[h], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sum;
  }
};

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

#endif

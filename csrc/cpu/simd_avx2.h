// AVX2: pairs of 256-bit registers and 16-bit sums of byte products, widened before they overflow. Codes of 4 and 8
// bits would overflow at once; the exact kernel is faster for them.
#pragma once

#include <cstring>

#include "cpu/tile.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace skvq::cpu {
inline namespace SKVQ_ISA {

struct Simd {
  struct Pair {
    __m256i half[2];
  };
  using Codes = Pair;
  using Narrow = Pair;  // 16-bit sums of products of bytes
  using Sum = Pair;

  static constexpr int kRegisters = 16, kPerVector = 2;  // registers there are, and that one Sum takes
  static constexpr int kProducts = 2, kNarrowMax = 32767;

  static constexpr bool supports(Code code) { return traits(code).levels <= 8; }

  SKVQ_FN static Sum zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  SKVQ_FN static Sum widen(Sum sum, Narrow part) {
    for (int h = 0; h < 2; ++h) {
      sum.half[h] = _mm256_add_epi32(sum.half[h], _mm256_madd_epi16(part.half[h], _mm256_set1_epi16(1)));
    }
    return sum;
  }
  SKVQ_FN static void to_float(Sum s, Floats (&lanes)[2]) {
    for (int h = 0; h < 2; ++h) lanes[h] = (Floats)_mm256_cvtepi32_ps(s.half[h]);
  }

  // The low byte of each lane.
  SKVQ_FN static void store_bytes(void* out, Ints v) {
    const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xff));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(static_cast<__m128i*>(out), _mm_packus_epi16(words, words));
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
  SKVQ_FN static Codes quad(const std::uint8_t* low, [[maybe_unused]] const std::uint8_t* high, int q) {
    constexpr int kWidth = traits(C).plane_bits[0], kQuads = 8 / kWidth;
    const __m256i field = _mm256_set1_epi8((1 << kWidth) - 1);
    Codes codes;
    for (int h = 0; h < 2; ++h) {
      const __m256i words = load(low + q / kQuads * 64 + h * 32);
      codes.half[h] = _mm256_and_si256(_mm256_srli_epi32(words, kWidth * (q % kQuads)), field);
      if constexpr (traits(C).plane_bits[1] == 1) {
        std::uint32_t mask;
        std::memcpy(&mask, high + q * 8 + h * 4, sizeof mask);
        const __m256i bit = _mm256_and_si256(bytes_of(mask), _mm256_set1_epi8(1 << kWidth));
        codes.half[h] = _mm256_or_si256(codes.half[h], bit);
      }
    }
    return codes;
  }

  // Every byte, which is under 243, divided by 9. A product of 16 bits serves the high byte, whose remainder and the
  // low byte together stay under the next quotient; another serves the low byte.
  SKVQ_FN static __m256i ninth(__m256i v) {
    const __m256i factor = _mm256_set1_epi16(7282), low = _mm256_set1_epi16(0xff);
    const __m256i of_low = _mm256_mulhi_epu16(_mm256_and_si256(v, low), factor);
    return _mm256_or_si256(of_low, _mm256_andnot_si256(low, _mm256_mulhi_epu16(v, factor)));
  }
  SKVQ_FN static __m256i nine_times(__m256i v) { return _mm256_add_epi8(v, _mm256_slli_epi16(v, 3)); }

  // The five base-3 digits of every byte.
  SKVQ_FN static void trits(__m256i v, __m256i (&digit)[kTritsPerByte]) {
    const __m256i modulo = _mm256_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0,  //
                                            0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0);
    const __m256i third = _mm256_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0,  //
                                           0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0);
    const __m256i high = ninth(v), low = _mm256_sub_epi8(v, nine_times(high));
    digit[4] = ninth(high);
    const __m256i middle = _mm256_sub_epi8(high, nine_times(digit[4]));
    digit[0] = _mm256_shuffle_epi8(modulo, low);
    digit[1] = _mm256_shuffle_epi8(third, low);
    digit[2] = _mm256_shuffle_epi8(modulo, middle);
    digit[3] = _mm256_shuffle_epi8(third, middle);
  }

  SKVQ_FN static void ternary_quads(const std::uint8_t* in, Codes (&codes)[16]) {
    __m256i digit[kTritsPerByte];
    for (int word = 0; word < 3; ++word) {
      for (int h = 0; h < 2; ++h) {
        trits(load(in + word * 64 + h * 32), digit);
        for (int k = 0; k < kTritsPerByte; ++k) codes[3 * k + word].half[h] = digit[k];
      }
    }
    // The last byte of a lane holds one quad: its digits go to the four bytes of the lane.
    trits(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 192))), digit);
    const auto lanes = [&](int k) { return _mm256_castsi256_si128(digit[k]); };
    const __m128i low01 = _mm_unpacklo_epi8(lanes(0), lanes(1)), low23 = _mm_unpacklo_epi8(lanes(2), lanes(3));
    const __m128i high01 = _mm_unpackhi_epi8(lanes(0), lanes(1)), high23 = _mm_unpackhi_epi8(lanes(2), lanes(3));
    codes[15].half[0] = _mm256_set_m128i(_mm_unpackhi_epi16(low01, low23), _mm_unpacklo_epi16(low01, low23));
    codes[15].half[1] = _mm256_set_m128i(_mm_unpackhi_epi16(high01, high23), _mm_unpacklo_epi16(high01, high23));
  }

  template <Code C>
  SKVQ_FN static Codes less_offset(Codes codes) {
    static_assert(supports(C));
    return codes;
  }

  SKVQ_FN static void add(Narrow& part, Codes codes, const std::int8_t* four) {
    const __m256i coefficients = broadcast(four);
    for (int h = 0; h < 2; ++h) accumulate(part.half[h], _mm256_maddubs_epi16(codes.half[h], coefficients));
  }
  SKVQ_FN static void add(Narrow& part, Codes codes, const std::uint8_t* four) {
    const __m256i coefficients = broadcast(four);
    for (int h = 0; h < 2; ++h) accumulate(part.half[h], _mm256_maddubs_epi16(coefficients, codes.half[h]));
  }

 private:
  // In this order: compilers would add products in trees, for which there are not enough registers.
  SKVQ_FN static void accumulate(__m256i& sum, __m256i product) {
    sum = _mm256_add_epi16(sum, product);
    asm("" : "+x"(sum));
  }
  SKVQ_FN static __m256i broadcast(const void* four) {
    using Four [[gnu::may_alias, gnu::aligned(4)]] = std::int32_t;  // one load: the broadcast then costs nothing
    return _mm256_set1_epi32(*static_cast<const Four*>(four));
  }
};

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

#endif

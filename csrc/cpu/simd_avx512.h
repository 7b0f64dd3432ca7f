// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later).
#pragma once

#include <cstring>

#include "cpu/tile.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include <immintrin.h>

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// trit_fields[v] = the four lowest base-3 digits of v < 81 in fields of two bits.
struct TritTable {
  alignas(64) std::uint8_t fields[128];
  constexpr TritTable() : fields{} {
    for (int v = 0; v < 81; ++v) {
      fields[v] = static_cast<std::uint8_t>(v % 3 | v / 3 % 3 << 2 | v / 9 % 3 << 4 | v / 27 % 3 << 6);
    }
  }
};
inline constexpr TritTable kTritTable{};

struct Simd {
  using Codes = __m512i;
  using Narrow = __m512i;  // sums of products of bytes
  using Sum = __m512i;

  static constexpr int kRegisters = 32, kPerVector = 1;  // registers there are, and that one Sum takes
  static constexpr int kProducts = 4, kNarrowMax = 0x7fffffff;

  static constexpr bool supports(Code) { return true; }

  SKVQ_FN static Sum zero() { return _mm512_setzero_si512(); }
  SKVQ_FN static Sum widen(Sum sum, Narrow part) { return _mm512_add_epi32(sum, part); }
  SKVQ_FN static void to_float(Sum s, Floats (&lanes)[1]) { lanes[0] = (Floats)_mm512_cvtepi32_ps(s); }

  // The low byte of each lane.
  SKVQ_FN static void store_bytes(void* out, Ints v) {
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm512_cvtepi32_epi8((__m512i)v));
  }

  template <int Width>
  SKVQ_FN static Codes field(__m512i words, int q) {
    return _mm512_and_si512(_mm512_srli_epi32(words, Width * q), _mm512_set1_epi8((1 << Width) - 1));
  }

  template <Code C>
  SKVQ_FN static Codes quad(const std::uint8_t* low, [[maybe_unused]] const std::uint8_t* high, int q) {
    constexpr int kWidth = traits(C).plane_bits[0], kQuads = 8 / kWidth;
    const __m512i words = _mm512_loadu_si512(low + q / kQuads * 64);
    Codes codes = kWidth == 8 ? words : field<kWidth>(words, q % kQuads);
    if constexpr (traits(C).plane_bits[1] == 1) {
      std::uint64_t mask;
      std::memcpy(&mask, high + q * 8, sizeof mask);
      codes = _mm512_or_si512(codes, _mm512_maskz_set1_epi8(mask, 1 << kWidth));
    }
    return codes;
  }

  SKVQ_FN static void ternary_quads(const std::uint8_t* in, Codes (&codes)[16]) {
    const __m512i low = _mm512_load_si512(kTritTable.fields), high = _mm512_load_si512(kTritTable.fields + 64);
    const __m512i top = _mm512_set1_epi8(81), one = _mm512_set1_epi8(1);
    for (int word = 0; word < 3; ++word) {
      __m512i v = _mm512_loadu_si512(in + word * 64);
      const __mmask64 over = _mm512_cmpge_epu8_mask(v, top);
      v = _mm512_mask_sub_epi8(v, over, v, top);
      const __mmask64 twice = _mm512_cmpge_epu8_mask(v, top);
      v = _mm512_mask_sub_epi8(v, twice, v, top);
      const __m512i fields = _mm512_permutex2var_epi8(low, v, high);
      for (int digit = 0; digit < 4; ++digit) codes[3 * digit + word] = field<2>(fields, digit);
      codes[12 + word] = _mm512_mask_add_epi8(_mm512_maskz_mov_epi8(over, one), twice, one, one);
    }
    // The last byte of a lane holds one quad: its digits go to the four bytes of the lane.
    const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 192)));
    const __m512i fields = _mm512_permutex2var_epi8(low, v, high);
    const __m512i spread = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2624222006040200), fields);
    codes[15] = _mm512_and_si512(spread, _mm512_set1_epi8(3));
  }

  // Codes of eight bits less 128; others as they are.
  template <Code C>
  SKVQ_FN static Codes less_offset(Codes codes) {
    return C == Code::kInt8 ? _mm512_xor_si512(codes, _mm512_set1_epi8(-128)) : codes;
  }

  SKVQ_FN static void add(Narrow& part, Codes codes, const std::int8_t* four) {
    part = _mm512_dpbusd_epi32(part, codes, broadcast(four));
  }
  // Codes must lie in -128 to 127.
  SKVQ_FN static void add(Narrow& part, Codes codes, const std::uint8_t* four) {
    part = _mm512_dpbusd_epi32(part, broadcast(four), codes);
  }

 private:
  SKVQ_FN static __m512i broadcast(const void* four) {
    using Four [[gnu::may_alias, gnu::aligned(4)]] = std::int32_t;  // one load: the broadcast then costs nothing
    return _mm512_set1_epi32(*static_cast<const Four*>(four));
  }
};

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

#endif

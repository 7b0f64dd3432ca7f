// AVX-512 on a CPU that has only AVX2: every instruction that csrc/cpu uses, lane by lane in plain C++, after the
// operation sections of Intel's instruction set reference. Included before all else (-include), it lets the AVX-512
// kernels be compiled and tested on any x86 machine; it says nothing about their speed.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace skvq::emulation {

// Registers as arrays of lanes.
template <class T>
struct Lanes512 {
  static constexpr int kCount = 64 / sizeof(T);
  T lane[kCount];

  template <class Register>
  static Lanes512 of(const Register& r) {
    Lanes512 lanes;
    std::memcpy(lanes.lane, &r, sizeof r);
    return lanes;
  }
  template <class F>
  static Lanes512 make(F&& f) {
    Lanes512 lanes;
    for (int i = 0; i < kCount; ++i) lanes.lane[i] = static_cast<T>(f(i));
    return lanes;
  }
  template <class Register>
  Register as() const {
    Register r;
    std::memcpy(&r, lane, sizeof r);
    return r;
  }
  __m512i integers() const { return as<__m512i>(); }
  __m512 floats() const { return as<__m512>(); }
};
using U8 = Lanes512<std::uint8_t>;
using I32 = Lanes512<std::int32_t>;
using U32 = Lanes512<std::uint32_t>;
using U64 = Lanes512<std::uint64_t>;
using F32 = Lanes512<float>;

inline bool set(std::uint64_t mask, int i) {
  return mask >> i & 1;
}

inline __m512i set1_epi8(char x) {
  return U8::make([&](int) { return static_cast<std::uint8_t>(x); }).integers();
}
inline __m512i set1_epi32(int x) {
  return I32::make([&](int) { return x; }).integers();
}
inline __m512i set1_epi64(long long x) {
  return U64::make([&](int) { return static_cast<std::uint64_t>(x); }).integers();
}
inline __m512i loadu_si512(const void* p) {
  __m512i r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
inline __m512i and_si512(__m512i a, __m512i b) {
  return U64::make([x = U64::of(a), y = U64::of(b)](int i) { return x.lane[i] & y.lane[i]; }).integers();
}
inline __m512i or_si512(__m512i a, __m512i b) {
  return U64::make([x = U64::of(a), y = U64::of(b)](int i) { return x.lane[i] | y.lane[i]; }).integers();
}
inline __m512i xor_si512(__m512i a, __m512i b) {
  return U64::make([x = U64::of(a), y = U64::of(b)](int i) { return x.lane[i] ^ y.lane[i]; }).integers();
}
inline __m512i add_epi32(__m512i a, __m512i b) {
  return U32::make([x = U32::of(a), y = U32::of(b)](int i) { return x.lane[i] + y.lane[i]; }).integers();
}
inline __m512i srli_epi32(__m512i a, unsigned bits) {
  return U32::make([&, x = U32::of(a)](int i) { return x.lane[i] >> bits; }).integers();
}
inline __m512i slli_epi32(__m512i a, unsigned bits) {
  return U32::make([&, x = U32::of(a)](int i) { return x.lane[i] << bits; }).integers();
}

// VPDPBUSD: unsigned bytes of a times signed bytes of b, summed by fours.
inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  return I32::make([s = I32::of(sum), x = U8::of(a), y = U8::of(b)](int i) {
           int total = s.lane[i];
           for (int j = 4 * i; j < 4 * i + 4; ++j) total += x.lane[j] * static_cast<std::int8_t>(y.lane[j]);
           return total;
         })
      .integers();
}

inline std::uint64_t cmpge_epu8_mask(__m512i a, __m512i b) {
  const U8 x = U8::of(a), y = U8::of(b);
  std::uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= std::uint64_t{x.lane[i] >= y.lane[i]} << i;
  return mask;
}
inline __m512i mask_sub_epi8(__m512i otherwise, std::uint64_t mask, __m512i a, __m512i b) {
  return U8::make([&, o = U8::of(otherwise), x = U8::of(a), y = U8::of(b)](int i) {
           return set(mask, i) ? x.lane[i] - y.lane[i] : o.lane[i];
         })
      .integers();
}
inline __m512i mask_add_epi8(__m512i otherwise, std::uint64_t mask, __m512i a, __m512i b) {
  return U8::make([&, o = U8::of(otherwise), x = U8::of(a), y = U8::of(b)](int i) {
           return set(mask, i) ? x.lane[i] + y.lane[i] : o.lane[i];
         })
      .integers();
}
inline __m512i maskz_mov_epi8(std::uint64_t mask, __m512i a) {
  return U8::make([&, x = U8::of(a)](int i) { return set(mask, i) ? x.lane[i] : 0; }).integers();
}
inline __m512i maskz_set1_epi8(std::uint64_t mask, char x) {
  return maskz_mov_epi8(mask, set1_epi8(x));
}

// VPERMT2B: the low seven bits of an index choose among the 128 bytes of a and b.
inline __m512i permutex2var_epi8(__m512i a, __m512i index, __m512i b) {
  return U8::make([x = U8::of(a), y = U8::of(b), at = U8::of(index)](int i) {
           const int n = at.lane[i] & 127;
           return n < 64 ? x.lane[n] : y.lane[n - 64];
         })
      .integers();
}
// VPMULTISHIFTQB: eight bits of the 64-bit lane, from the bit that the control byte names, around its end.
inline __m512i multishift_epi64_epi8(__m512i control, __m512i a) {
  return U8::make([at = U8::of(control), x = U64::of(a)](int i) {
           const int bit = at.lane[i] & 63;
           const std::uint64_t v = x.lane[i / 8];
           return bit == 0 ? v : v >> bit | v << (64 - bit);
         })
      .integers();
}
// VPERMILPS: two bits of an index choose among the four floats of its 128 bits.
inline __m512 permutevar_ps(__m512 a, __m512i index) {
  return F32::make([x = F32::of(a), at = U32::of(index)](int i) { return x.lane[i / 4 * 4 + (at.lane[i] & 3)]; })
      .floats();
}

inline __m512 cvtepi32_ps(__m512i a) {
  return F32::make([x = I32::of(a)](int i) { return x.lane[i]; }).floats();
}
inline __m512i cvtepu8_epi32(__m128i a) {
  return I32::make([x = U8::of(a)](int i) { return x.lane[i]; }).integers();
}
inline __m512i cvtepu16_epi32(__m256i a) {
  return I32::make([x = Lanes512<std::uint16_t>::of(a)](int i) { return x.lane[i]; }).integers();
}
inline __m128i cvtepi32_epi8(__m512i a) {
  return U8::make([x = I32::of(a)](int i) { return i < 16 ? x.lane[i] : 0; }).as<__m128i>();
}
inline __m512 cvtph_ps(__m256i a) {
  alignas(32) float out[16];
  _mm256_store_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(a)));
  _mm256_store_ps(out + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
  return F32::make([&](int i) { return out[i]; }).floats();
}

}  // namespace skvq::emulation

// Without optimization immintrin.h has these as macros.
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32

#define _mm512_add_epi32 skvq::emulation::add_epi32
#define _mm512_and_si512 skvq::emulation::and_si512
#define _mm512_cmpge_epu8_mask skvq::emulation::cmpge_epu8_mask
#define _mm512_cvtepi32_epi8 skvq::emulation::cvtepi32_epi8
#define _mm512_cvtepi32_ps skvq::emulation::cvtepi32_ps
#define _mm512_cvtepu16_epi32 skvq::emulation::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 skvq::emulation::cvtepu8_epi32
#define _mm512_cvtph_ps skvq::emulation::cvtph_ps
#define _mm512_dpbusd_epi32 skvq::emulation::dpbusd_epi32
#define _mm512_load_si512 skvq::emulation::loadu_si512
#define _mm512_loadu_si512 skvq::emulation::loadu_si512
#define _mm512_mask_add_epi8 skvq::emulation::mask_add_epi8
#define _mm512_mask_sub_epi8 skvq::emulation::mask_sub_epi8
#define _mm512_maskz_mov_epi8 skvq::emulation::maskz_mov_epi8
#define _mm512_maskz_set1_epi8 skvq::emulation::maskz_set1_epi8
#define _mm512_multishift_epi64_epi8 skvq::emulation::multishift_epi64_epi8
#define _mm512_or_si512 skvq::emulation::or_si512
#define _mm512_permutevar_ps skvq::emulation::permutevar_ps
#define _mm512_permutex2var_epi8 skvq::emulation::permutex2var_epi8
#define _mm512_set1_epi32 skvq::emulation::set1_epi32
#define _mm512_set1_epi64 skvq::emulation::set1_epi64
#define _mm512_set1_epi8 skvq::emulation::set1_epi8
#define _mm512_setzero_si512() skvq::emulation::set1_epi32(0)
#define _mm512_slli_epi32 skvq::emulation::slli_epi32
#define _mm512_srli_epi32 skvq::emulation::srli_epi32
#define _mm512_xor_si512 skvq::emulation::xor_si512

// What a compiler defines that may use these instructions.
#define __AVX512F__ 1
#define __AVX512VNNI__ 1
#define __AVX512VBMI__ 1

// Four-way byte dot products on blocks of 16 lanes x 16 fields: the vector instructions of the integer kernel.
//
// `Simd::block<Code>` reads the codes of one block as four vectors, one a quad of fields; `Simd::dot` adds
// sum over the 16 fields of code * coefficient to every lane.
#pragma once

#include "cpu/tile.h"
#include "skvq/record.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include "cpu/simd_avx512.h"
#define SKVQ_HAS_SIMD 1
#elif defined(__AVX2__)
#include "cpu/simd_avx2.h"
#define SKVQ_HAS_SIMD 1
#else
#define SKVQ_HAS_SIMD 0
#endif

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// Calls f.operator()<Code>() for the code at hand.
template <class F>
SKVQ_FN void with_code(Code code, F&& f) {
  switch (code) {
    case Code::kInt8:
      return f.template operator()<Code::kInt8>();
    case Code::kInt4:
      return f.template operator()<Code::kInt4>();
    case Code::kInt3:
      return f.template operator()<Code::kInt3>();
    case Code::kInt2:
    case Code::kTernaryFast:
      return f.template operator()<Code::kInt2>();
    case Code::kTernary:
      return f.template operator()<Code::kTernary>();
  }
}

#if SKVQ_HAS_SIMD
// The block (tb, cb) of a band of `channels` whose codes start at `codes`. `ahead` is the way to the record that comes
// next: asking for its lines one by one, as these are used, keeps memory busy without crowding it.
template <Code C>
SKVQ_FN void load_block(Side side, int channels, int tb, int cb, const std::uint8_t* codes, std::ptrdiff_t ahead,
                        Simd::Codes (&quads)[4]) {
  constexpr int kLow = traits(C).plane_bits[0], kHigh = traits(C).plane_bits[1];
  const std::uint8_t* low = codes + Lanes::block_offset(side, kLow, channels, tb, cb);
  const std::uint8_t* high = codes;
  if constexpr (kHigh > 0) high += high_block(side, kLow, kHigh, channels, tb, cb);
  for (int line = 0; line < Lanes::block_bytes(kLow); line += 64) __builtin_prefetch(low + ahead + line);
  Simd::block<C>(low, high, quads);
}
#endif

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

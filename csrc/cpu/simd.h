// Byte dot products on blocks of 16 lanes x 16 fields: the vector instructions of the integer kernel.
//
// `Simd::quad<Code>` reads the codes of four fields of a block; `Simd::add` adds the sum over them of code *
// coefficient to every lane of a narrow sum, and `Simd::widen` adds a narrow sum to a wide one before it overflows.
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

// Calls f.operator()<Code>() for the bit planes at hand.
template <class F>
SKVQ_FN void with_planes(Code code, F&& f) {
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
      return;  // has none
  }
}

// The blocks of a band. `ahead` is the way to the record that comes next: asking for its lines one by one, as these are
// used, keeps memory busy without crowding it.
template <Code C>
struct Blocks {
  static constexpr int kLow = traits(C).plane_bits[0], kHigh = traits(C).plane_bits[1];
  const std::uint8_t* codes;
  Side side;
  int channels;
  std::ptrdiff_t ahead;

  // First bytes of the block (token block, channel block) in both planes.
  SKVQ_FN const std::uint8_t* low(int tb, int cb) const {
    return codes + Lanes::block_offset(side, kLow, channels, tb, cb);
  }
  SKVQ_FN const std::uint8_t* high(int tb, int cb) const {
    return kHigh == 0 ? nullptr : codes + high_block(side, kLow, kHigh, channels, tb, cb);
  }
  SKVQ_FN void prefetch(int tb, int cb) const {
    for (int line = 0; line < Lanes::block_bytes(kLow); line += 64) __builtin_prefetch(low(tb, cb) + ahead + line);
  }
};

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

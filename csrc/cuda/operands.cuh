// Codes of a record as A operands of the tensor cores, taken where they lie.
//
// The bit pattern n of an fp16 number below 2048 stands for n * 2^-24: subnormals and the first normal numbers are one
// straight line. A code left in its field after one AND is therefore an operand already, code * 2^bit * 2^-24, with no
// conversion; all four registers of a matrix keep the same `bit`, so that a power of two per matrix undoes it.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/unroll.cuh"
#include "skvq/arrangement.h"

// 1: operands are ordinary halves, code * 2^bit, built with the exponent of 1024. Two instructions more for each
// register; for hardware whose tensor cores would not take subnormal operands exactly (bench/unit_checks.cu tells).
#if !defined(SKVQ_NORMAL_OPERANDS)
#define SKVQ_NORMAL_OPERANDS 0
#endif

namespace skvq::cuda {

// log2 of what an operand is worth beside code * 2^bit.
inline constexpr int kOperandExponent = SKVQ_NORMAL_OPERANDS ? 0 : -24;

// The bit of each half at which the codes of a block of 16 channels come to lie: such that few words need a shift, and
// below bit 10 with all their bits.
SKVQ_FN constexpr int operand_bit(Code code, int block) {
  switch (code) {
    case Code::kInt8:
      return 0;
    case Code::kInt4:
      return block % 2 * 4;
    case Code::kInt3:
      return block % 4 * 2;
    case Code::kInt2:
    case Code::kTernaryFast:
      return block % 8 < 5 ? block % 8 * 2 : (block % 8 - 5) * 2;
    case Code::kTernary:
      return 8;
  }
  return 0;
}

SKVQ_DEVICE std::uint32_t as_operand(std::uint32_t field) {
#if SKVQ_NORMAL_OPERANDS
  return ptx::add_f16x2(field | 0x64006400u, 0xe400e400u);  // 1024 + n, less 1024
#else
  return field;
#endif
}

// Lane words of a band, a run at a time; they are asked for in ascending order.
template <int Words>
struct WordReader {
  const unsigned char* codes;
  int lane;
  std::uint32_t run[4] = {};

  template <int Word>
  SKVQ_DEVICE void load() {
    constexpr int length = Mma::run_of(Words, Word).length;
    const unsigned char* p = codes + Mma::word_offset(Words, 0, Word) + lane * length * 4;
    if constexpr (length == 4) {
      const uint4 w = *reinterpret_cast<const uint4*>(p);
      run[0] = w.x, run[1] = w.y, run[2] = w.z, run[3] = w.w;
    } else if constexpr (length == 2) {
      const uint2 w = *reinterpret_cast<const uint2*>(p);
      run[0] = w.x, run[1] = w.y;
    } else {
      run[0] = *reinterpret_cast<const std::uint32_t*>(p);
    }
  }
};

template <int Shift>
SKVQ_DEVICE std::uint32_t shift_right(std::uint32_t word) {
  if constexpr (Shift >= 0) return word >> Shift;
  return word << (Shift < 0 ? -Shift : 0);
}

// One bit plane of a band.
template <int Width, int Channels>
struct PlaneReader {
  static constexpr int kWords = Mma::plane_words(Width, Channels);
  WordReader<kWords> words;

  // To be called for every matrix, in order, before its fields are taken.
  template <int U>
  SKVQ_DEVICE void begin_matrix() {
    constexpr Mma::Run run = Mma::run_of(kWords, Mma::field(Width, Channels, U, 0).word);
    constexpr bool first = U == 0 || run.first != Mma::run_of(kWords, Mma::field(Width, Channels, U - 1, 0).word).first;
    if constexpr (first) words.template load<run.first>();
  }
  // The two fields of a register, moved to `Bit`; all other bits are 0.
  template <int U, int Reg, int Bit>
  SKVQ_DEVICE std::uint32_t field() const {
    constexpr Mma::Field from = Mma::field(Width, Channels, U, Reg);
    constexpr std::uint32_t mask = ((1u << Width) - 1u) << Bit;
    constexpr int at = from.word - Mma::run_of(kWords, from.word).first;
    return shift_right<from.bit - Bit>(words.run[at]) & (mask | mask << 16);
  }
};

// The codes of one band inside a record, with what the lane carries from one matrix to the next. Matrices (skvq::Mma)
// are read in order.
template <Code C, int Channels>
struct BandReader {
  static constexpr int kBlocks = Channels / 16;
  static constexpr int kLow = traits(C).plane_bits[0], kHigh = traits(C).plane_bits[1];

  PlaneReader<kLow, Channels> low;
  PlaneReader<kHigh == 0 ? 1 : kHigh, Channels> high;

  SKVQ_DEVICE BandReader(const unsigned char* codes, int lane)
      : low{{codes, lane}}, high{{codes + Channels * kTileTokens * kLow / 8, lane}} {}

  template <int U>
  SKVQ_DEVICE void read(std::uint32_t (&a)[4]) {
    constexpr int bit = operand_bit(C, U % kBlocks);
    low.template begin_matrix<U>();
    if constexpr (kHigh > 0) high.template begin_matrix<U>();
    unroll<4>([&](auto reg) {
      std::uint32_t operand = low.template field<U, reg, bit>();
      if constexpr (kHigh > 0) operand |= high.template field<U, reg, bit + kLow>();
      a[reg] = as_operand(operand);
    });
  }
};

// Base 3: tripling a byte as a fraction of 256 pushes its next trit to bits 8 and 9, where it is an operand.
template <int Channels>
struct BandReader<Code::kTernary, Channels> {
  static constexpr int kBlocks = Channels / 16;
  static constexpr std::uint32_t kBytes = 0x00ff00ffu, kTrits = 0x03000300u;

  WordReader<Mma::trit_words(Channels)> words;
  std::uint32_t first = 0, second = 0;  // bytes 0 and 2, bytes 1 and 3 of the word that is being read

  SKVQ_DEVICE BandReader(const unsigned char* codes, int lane) : words{codes, lane} {}

  template <int U>
  SKVQ_DEVICE void read(std::uint32_t (&a)[4]) {
    unroll<4>([&](auto reg) { a[reg] = as_operand(next<U * 4 + reg>()); });
  }

 private:
  template <int Pair>
  SKVQ_DEVICE std::uint32_t next() {
    constexpr int in_word = Pair % Mma::kPairsPerWord;
    if constexpr (in_word == 0) load<Pair / Mma::kPairsPerWord>();
    std::uint32_t& bytes = in_word < kTritsPerByte ? first : second;
    bytes *= 3u;
    const std::uint32_t trits = bytes & kTrits;
    bytes &= kBytes;
    return trits;
  }
  template <int Word>
  SKVQ_DEVICE void load() {
    constexpr int count = Mma::trit_words(Channels);
    if constexpr (Word < count) {
      constexpr Mma::Run run = Mma::run_of(count, Word);
      if constexpr (Word == run.first) words.template load<Word>();
      const std::uint32_t word = words.run[Word - run.first];
      first = word & kBytes;
      second = word >> 8 & kBytes;
    } else {
      static_assert(Mma::trit_tail_bytes(Channels) == 2 * Mma::kLanes, "this number of ternary channels has no reader");
      const std::uint32_t both =
          reinterpret_cast<const std::uint16_t*>(words.codes + count * 4 * Mma::kLanes)[words.lane];
      first = (both | both << 8) & kBytes;
    }
  }
};

}  // namespace skvq::cuda

// The codes of one side of a tile as bytes in shared memory, and from there into the words of the arrangement Mma.
//
// They lie matrix by matrix as Mma numbers them, band after band. The two codes of a register are neighbours, so that a
// lane takes both at once: in a matrix whose rows are tokens, [token][channel], two channels of a token, and in one
// whose rows are channels, [pair of tokens][channel][2], two tokens of a channel. `rows`: the side whose matrices are
// like it.
#pragma once

#include "cuda/append_params.cuh"
#include "cuda/unroll.cuh"

namespace skvq::cuda {

inline constexpr int kMatrixBytes = 16 * 16 + 16;  // lanes write to eight matrices at once: not all to the same banks

SKVQ_FN constexpr int matrix_bytes_of(int channels) {
  return Mma::kSteps * (channels / 16) * kMatrixBytes;
}
// Token and channel of a matrix.
SKVQ_FN constexpr int staged_at(Side rows, int token, int channel) {
  return rows == Side::kKey ? token * 16 + channel : token / 2 * 32 + channel * 2 + token % 2;
}
SKVQ_FN constexpr int staged_at(Side rows, Mma::Element e) {
  return rows == Side::kKey ? staged_at(rows, e.row, e.column) : staged_at(rows, e.column, e.row);
}

// Where a lane takes its codes of the matrices of a band.
struct StagedCodes {
  const unsigned char* first;  // register 0 of matrix 0
  int odd, upper;              // bytes from there to registers 1 and 2; both lead to register 3

  SKVQ_DEVICE StagedCodes(const unsigned char* stage, const PackedBand& band, int lane)
      : first(stage + matrix_bytes_of(band.begin) + staged_at(band.rows, Mma::element(lane, 0, 0))),
        odd(staged_at(band.rows, Mma::element(0, 1, 0))),
        upper(staged_at(band.rows, Mma::element(0, 2, 0))) {}

  // Two codes, in bits 0 to 7 and 8 to 15.
  SKVQ_DEVICE std::uint32_t pair(int matrix, int reg) const {
    const unsigned char* p = first + (reg % 2 == 0 ? 0 : odd) + (reg < 2 ? 0 : upper) + matrix * kMatrixBytes;
    return *reinterpret_cast<const std::uint16_t*>(p);
  }
  SKVQ_DEVICE void skip(int matrices) { first += matrices * kMatrixBytes; }
};

// Pairs of codes on their way into a word: bits 0 to 7 and 8 to 15 go to one byte of each half of the word.
struct WordBytes {
  std::uint32_t low = 0, high = 0;  // bytes 0 and 2, bytes 1 and 3

  SKVQ_DEVICE std::uint32_t word() const { return __byte_perm(low, high, 0x5140); }
};

template <int Length>
SKVQ_DEVICE void store_words(unsigned char* to, const std::uint32_t (&w)[Length]) {
  if constexpr (Length == 4) {
    *reinterpret_cast<uint4*>(to) = {w[0], w[1], w[2], w[3]};
  } else if constexpr (Length == 2) {
    *reinterpret_cast<uint2*>(to) = {w[0], w[1]};
  } else {
    *reinterpret_cast<std::uint32_t*>(to) = w[0];
  }
}

// ---- Planes of bits ----

// `low`: how many bits of a code are in the planes before.
template <int Width, int Length>
SKVQ_DEVICE void pack_run(const StagedCodes& codes, int low, unsigned char* to) {
  constexpr int matrices = Length * 4 / Width, mask = ((1 << Width) - 1) * 0x0101;
  constexpr int channels = 16 * (Length < Width ? 1 : Length / Width);  // of a band that starts with such a run
  static_assert(Mma::run_of(Mma::plane_words(Width, channels), 0).length == Length);
  WordBytes bytes[Length];
  unroll<matrices>([&](auto v) {
    unroll<Mma::kRegisters>([&](auto r) {
      constexpr Mma::Field f = Mma::field(Width, channels, v, r);
      std::uint32_t pair = codes.pair(v, r);
      if constexpr (Width < 8) pair = pair >> low & mask;
      (f.bit < 8 ? bytes[f.word].low : bytes[f.word].high) |= pair << f.bit % 8;
    });
  });
  std::uint32_t words[Length];
  unroll<Length>([&](auto i) { words[i] = bytes[i].word(); });
  store_words(to, words);
}

template <int Width>
SKVQ_DEVICE void pack_plane(StagedCodes codes, int channels, int low, int lane, unsigned char* out) {
  const int words = Mma::plane_words(Width, channels);
  for (int first = 0; first < words;) {
    const int length = Mma::run_of(words, first).length;
    unsigned char* to = out + Mma::word_offset(words, lane, first);
    if (length == 4) pack_run<Width, 4>(codes, low, to);
    if constexpr (Width <= 2) {
      if (length == 2) pack_run<Width, 2>(codes, low, to);
    }
    if constexpr (Width == 1) {
      if (length == 1) pack_run<Width, 1>(codes, low, to);
    }
    first += length;
    codes.skip(length * 4 / Width);
  }
}

SKVQ_DEVICE void pack_plane_of(int width, const StagedCodes& codes, int channels, int low, int lane,
                               unsigned char* out) {
  switch (width) {
    case 8:
      return pack_plane<8>(codes, channels, low, lane, out);
    case 4:
      return pack_plane<4>(codes, channels, low, lane, out);
    case 2:
      return pack_plane<2>(codes, channels, low, lane, out);
    case 1:
      return pack_plane<1>(codes, channels, low, lane, out);
  }
}

// ---- Trits ----

// Mma::to_byte without a division: the result is in bits 16 to 23.
SKVQ_FN constexpr std::uint32_t scaled_trits(std::uint32_t trits) {
  return trits * 69042u + 65535u;  // 2^24 / 243, and rounding up
}
SKVQ_FN constexpr bool scales_all_trits() {
  bool same = true;
  for (int t = 0; t < power_of_three(kTritsPerByte); ++t) {
    same = same && static_cast<int>(scaled_trits(static_cast<std::uint32_t>(t)) >> 16) == Mma::to_byte(t);
  }
  return same;
}
static_assert(scales_all_trits());

SKVQ_DEVICE std::uint32_t trit_word(const WordBytes& sums) {
  const std::uint32_t first = __byte_perm(scaled_trits(sums.low & 0xffu), scaled_trits(sums.high & 0xffu), 0x0062);
  const std::uint32_t second = __byte_perm(scaled_trits(sums.low >> 8), scaled_trits(sums.high >> 8), 0x0062);
  return __byte_perm(first, second, 0x5410);
}

// `Matrices`: how many there are; trits beyond them are 0.
template <int Length, int Matrices>
SKVQ_DEVICE void pack_trit_run(const StagedCodes& codes, unsigned char* to) {
  constexpr int channels = Length == 4 ? 48 : 16 * Length;  // of a band that starts with such a run
  static_assert(Mma::run_of(Mma::trit_words(channels), 0).length == Length);
  WordBytes sums[Length];
  unroll<Length * Mma::kPairsPerWord>([&](auto p) {
    constexpr Slot slot = Mma::trit_of_pair(channels, 0, p, 0);
    constexpr int v = p / Mma::kRegisters, weight = power_of_three(slot.shift);
    if constexpr (v < Matrices) {
      const std::uint32_t pair = codes.pair(v, p % Mma::kRegisters);
      (slot.byte % 4 == 0 ? sums[slot.byte / 4].low : sums[slot.byte / 4].high) += pair * weight;
    }
  });
  std::uint32_t words[Length];
  unroll<Length>([&](auto i) { words[i] = trit_word(sums[i]); });
  store_words(to, words);
}

// The bytes behind the words, where pairs of several lanes may share one. `sums` has room for kTritTailBytes.
inline constexpr int kTritTailBytes = 4 * Mma::kLanes;
SKVQ_DEVICE void pack_trit_tail(const StagedCodes& codes, int channels, int lane, int* sums, unsigned char* out) {
  const int words = Mma::trit_words(channels), first = words * 4 * Mma::kLanes;
  const int bytes = kTernaryTileRows * channels - first;
  for (int i = lane; i < bytes; i += Mma::kLanes) sums[i] = 0;
  __syncwarp();
  for (int p = words * Mma::kPairsPerWord; p < Mma::trit_pairs(channels); ++p) {
    const std::uint32_t pair = codes.pair(p / Mma::kRegisters, p % Mma::kRegisters);
    for (int half = 0; half < 2; ++half) {
      const Slot slot = Mma::trit_of_pair(channels, lane, p, half);
      atomicAdd(sums + slot.byte - first, static_cast<int>(pair >> 8 * half & 0xffu) * power_of_three(slot.shift));
    }
  }
  __syncwarp();
  for (int i = lane; i < bytes; i += Mma::kLanes) out[first + i] = static_cast<unsigned char>(Mma::to_byte(sums[i]));
}

// The last word may have room for more matrices than are left.
template <int Length>
SKVQ_DEVICE void pack_trit_run_of(const StagedCodes& codes, int matrices, unsigned char* to) {
  constexpr int most = (Length * Mma::kPairsPerWord + Mma::kRegisters - 1) / Mma::kRegisters;
  if (matrices >= most) return pack_trit_run<Length, most>(codes, to);
  if (matrices == most - 1) return pack_trit_run<Length, most - 1>(codes, to);
  pack_trit_run<Length, most - 2>(codes, to);
}

SKVQ_DEVICE void pack_trits(const StagedCodes& codes, int channels, int lane, int* sums, unsigned char* out) {
  const int words = Mma::trit_words(channels);
  StagedCodes left = codes;
  int matrices = Mma::trit_pairs(channels) / Mma::kRegisters;
  for (int first = 0; first < words;) {
    const int length = Mma::run_of(words, first).length;
    unsigned char* to = out + Mma::word_offset(words, lane, first);
    if (length == 4) pack_trit_run_of<4>(left, matrices, to);
    if (length == 2) pack_trit_run_of<2>(left, matrices, to);
    if (length == 1) pack_trit_run_of<1>(left, matrices, to);
    const int packed = length * Mma::kPairsPerWord / Mma::kRegisters;
    first += length;
    matrices -= packed;
    left.skip(packed);
  }
  pack_trit_tail(codes, channels, lane, sums, out);
}

}  // namespace skvq::cuda

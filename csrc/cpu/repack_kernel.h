// Records in another arrangement, and codes in the form that the attention kernels read.
#pragma once

#include "cpu/simd.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

template <class From, class To>
void repack_side(const RecordFormat& format, Side side, const std::uint8_t* from, std::uint8_t* to) {
  const TensorFormat& tensor = format.side(side);
  std::uint8_t codes[kMaxHeadDim * kTileTokens];
  for (int b = 0; b < tensor.num_bands; ++b) {
    const Band& band = tensor.bands[b];
    const int offset = format.band_offset(side, b);
    for (int c = 0; c < band.channels; ++c) {
      for (int t = 0; t < kTileTokens; ++t) {
        codes[c * kTileTokens + t] = static_cast<std::uint8_t>(read_code<From>(side, band, from + offset, t, c));
      }
    }
    pack_band<To>(side, band, codes, to + offset);
  }
  const int groups = tensor.num_groups(), meta = format.meta_offset(side);
  for (int g = 0; g < groups; ++g) {
    for (int t = 0; t < kTileTokens; ++t) {
      for (int which = 0; which < 2; ++which) {
        store_meta(format.meta, to + meta, To::meta(groups, t, g, which),
                   load_meta(format.meta, from + meta, From::meta(groups, t, g, which)));
      }
    }
  }
}

inline void repack_record(const RecordFormat& format, ArrangementKind target, const std::uint8_t* from,
                          std::uint8_t* to) {
  visit_arrangement(format.arrangement, [&]<class From>() {
    visit_arrangement(target, [&]<class To>() {
      for (const Side side : kSides) repack_side<From, To>(format, side, from, to);
    });
  });
}

// Trits of sixteen channels: the bytes of quad q, lane by lane, are tokens 4q to 4q + 3 of a channel.
inline void read_trits(const std::uint8_t* in, std::uint8_t (&quad)[16][64]) {
#if SKVQ_HAS_SIMD
  Simd::Codes codes[16];
  Simd::ternary_quads(in, codes);
  std::memcpy(quad, codes, sizeof quad);
#else
  const auto digits = [](int count, int bytes, std::uint8_t* rest, auto&& put) {
    for (int digit = 0; digit < count; ++digit) {
      for (int i = 0; i < bytes; ++i) {
        const std::uint8_t third = static_cast<std::uint8_t>(rest[i] * 171 >> 9);  // exact under 256
        put(digit, i, static_cast<std::uint8_t>(rest[i] - 3 * third));
        rest[i] = third;
      }
    }
  };
  std::uint8_t rest[64];
  for (int word = 0; word < 3; ++word) {
    std::memcpy(rest, in + word * 64, 64);
    digits(kTritsPerByte, 64, rest, [&](int digit, int i, std::uint8_t trit) { quad[3 * digit + word][i] = trit; });
  }
  std::memcpy(rest, in + 192, 16);
  digits(Lanes::kQuad, 16, rest, [&](int digit, int i, std::uint8_t trit) { quad[15][i * 4 + digit] = trit; });
#endif
}

// Trits of one band, in arrangement `lanes`, as codes of two bits.
inline void widen_trits(Side side, int channels, const std::uint8_t* in, std::uint8_t* out) {
  for (int cb = 0; cb < channels / 16; ++cb, in += Lanes::kTernaryBlockBytes) {
    std::uint8_t quad[16][64];  // [four tokens][16 channels x 4 tokens]
    read_trits(in, quad);
    for (int tb = 0; tb < Lanes::kBlocks; ++tb) {
      std::uint8_t* block = out + Lanes::block_offset(side, 2, channels, tb, cb);
      if (side == Side::kValue) {
        for (int i = 0; i < 64; ++i) {
          const std::uint8_t (*q)[64] = quad + 4 * tb;
          block[i] = static_cast<std::uint8_t>(q[0][i] | q[1][i] << 2 | q[2][i] << 4 | q[3][i] << 6);
        }
        continue;
      }
      for (int t = 0; t < 16; ++t) {
        const std::uint8_t* token = quad[4 * tb + t / 4] + t % 4;
        for (int c = 0; c < 4; ++c) {
          block[t * 4 + c] = static_cast<std::uint8_t>(token[c * 4] | token[(c + 4) * 4] << 2 |
                                                       token[(c + 8) * 4] << 4 | token[(c + 12) * 4] << 6);
        }
      }
    }
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

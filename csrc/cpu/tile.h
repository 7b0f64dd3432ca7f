// Codes of a tile into the bytes of a record and back, for every arrangement.
//
// `Rows` and `Mma` go code by code through the arrangement's positions; `Lanes` moves blocks of 16 x 16 with vector
// instructions. All give the same values (tests/cpp/test_tile.cpp).
#pragma once

#include <cstring>

#include "core/minifloat.h"
#include "core/read_code.h"
#include "cpu/vector.h"
#include "skvq/record.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// Codes of one band, [channel][64 tokens], to bytes and back, one by one.
template <class Arrangement>
void pack_band(Side side, const Band& band, const std::uint8_t* codes, std::uint8_t* out) {
  std::memset(out, 0, tile_code_bytes(band.code, band.channels));
  for (int c = 0; c < band.channels; ++c) {
    for (int t = 0; t < kTileTokens; ++t) {
      const int code = codes[c * kTileTokens + t];
      if (is_base3(band.code)) {
        const Slot slot = Arrangement::trit(band.channels, t, c);
        const int trits = Arrangement::from_byte(out[slot.byte]) + code * power_of_three(slot.shift);
        out[slot.byte] = static_cast<std::uint8_t>(Arrangement::to_byte(trits));
        continue;
      }
      std::uint8_t* plane = out;
      int low = 0;
      for (const int width : traits(band.code).plane_bits) {
        if (width == 0) continue;
        const Slot slot = Arrangement::bits(side, width, band.channels, t, c);
        plane[slot.byte] |= static_cast<std::uint8_t>(((code >> low) & ((1 << width) - 1)) << slot.shift);
        plane += band.channels * kTileTokens * width / 8;
        low += width;
      }
    }
  }
}

// ---- Lanes, a block of 16 tokens x 16 channels at a time ----

struct Block {
  std::uint32_t field[16][16];  // [field][lane]
};

template <int Width>
SKVQ_FN void write_plane(const Block& block, int low, std::uint8_t* out) {
  if constexpr (Width == 1) {
    std::uint64_t masks[4] = {};
    for (int f = 0; f < 16; ++f) {
      for (int lane = 0; lane < 16; ++lane) {
        masks[f / 4] |= static_cast<std::uint64_t>(block.field[f][lane] >> low & 1u) << (lane * 4 + f % 4);
      }
    }
    std::memcpy(out, masks, sizeof masks);
  } else {
    constexpr int kFields = 32 / Width;
    for (int first = 0; first < 16; first += kFields) {
      std::uint32_t words[16] = {};
      for (int f = 0; f < kFields; ++f) {
        const int shift = 8 * (f % 4) + Width * (f / 4);
        for (int lane = 0; lane < 16; ++lane) {
          words[lane] |= (block.field[first + f][lane] >> low & ((1u << Width) - 1)) << shift;
        }
      }
      std::memcpy(out + first / kFields * 64, words, sizeof words);
    }
  }
}

// First byte of a block in the second plane of a code whose first plane has `low_width` bits.
SKVQ_FN int high_block(Side side, int low_width, int high_width, int channels, int tb, int cb) {
  return channels * kTileTokens * low_width / 8 + Lanes::block_offset(side, high_width, channels, tb, cb);
}

template <int Low, int High>
void pack_lanes(Side side, const Band& band, const std::uint8_t* codes, std::uint8_t* out) {
  for (int tb = 0; tb < Lanes::kBlocks; ++tb) {
    for (int cb = 0; cb < band.channels / 16; ++cb) {
      Block block;
      for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) {
          const int channel = cb * 16 + (side == Side::kKey ? i : j), token = tb * 16 + (side == Side::kKey ? j : i);
          block.field[i][j] = codes[channel * kTileTokens + token];
        }
      }
      write_plane<Low>(block, 0, out + Lanes::block_offset(side, Low, band.channels, tb, cb));
      if constexpr (High > 0) write_plane<High>(block, Low, out + high_block(side, Low, High, band.channels, tb, cb));
    }
  }
}

inline void pack_lanes_ternary(const Band& band, const std::uint8_t* codes, std::uint8_t* out) {
  std::memset(out, 0, tile_code_bytes(band.code, band.channels));
  for (int t = 0; t < kTileTokens; ++t) {
    const Slot first = Lanes::trit(band.channels, t, 0);
    const int stride = Lanes::trit(band.channels, t, 1).byte - first.byte, weight = power_of_three(first.shift);
    for (int c = 0; c < band.channels; ++c) {
      std::uint8_t& byte = out[first.byte + c / 16 * Lanes::kTernaryBlockBytes + c % 16 * stride];
      byte = static_cast<std::uint8_t>(byte + codes[c * kTileTokens + t] * weight);
    }
  }
}

template <>
inline void pack_band<Lanes>(Side side, const Band& band, const std::uint8_t* codes, std::uint8_t* out) {
  switch (band.code) {
    case Code::kInt8:
      return pack_lanes<8, 0>(side, band, codes, out);
    case Code::kInt4:
      return pack_lanes<4, 0>(side, band, codes, out);
    case Code::kInt3:
      return pack_lanes<2, 1>(side, band, codes, out);
    case Code::kInt2:
    case Code::kTernaryFast:
      return pack_lanes<2, 0>(side, band, codes, out);
    case Code::kTernary:
      return pack_lanes_ternary(band, codes, out);
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

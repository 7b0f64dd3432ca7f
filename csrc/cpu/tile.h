// Codes of a tile into the bytes of a record, for every arrangement, a block of 16 tokens x 16 channels at a time.
//
// `Rows` and `Mma` go code by code through the arrangement's positions; `Lanes` is written with vector instructions.
// All give the same values (tests/cpp/test_tile.cpp).
#pragma once

#include <cstring>

#include "core/minifloat.h"
#include "core/read_code.h"
#include "cpu/vector.h"
#include "skvq/record.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// Lanes and fields are tokens and channels, or channels and tokens.
struct Block {
  std::uint32_t field[16][16];  // [field][lane]
};

// What the lanes of a block are is up to arrangement `lanes`, so that its words are made without a transposition.
SKVQ_FN bool lanes_are_tokens(Side side, Code code) {
  return side == Side::kKey && !is_base3(code);
}

// One code into bytes that were 0.
template <class Arrangement>
void put_code(Side side, const Band& band, int token, int channel, int code, std::uint8_t* out) {
  if (is_base3(band.code)) {
    const Slot slot = Arrangement::trit(band.channels, token, channel);
    const int trits = Arrangement::from_byte(out[slot.byte]) + code * power_of_three(slot.shift);
    out[slot.byte] = static_cast<std::uint8_t>(Arrangement::to_byte(trits));
    return;
  }
  int low = 0;
  for (const int width : traits(band.code).plane_bits) {
    if (width == 0) continue;
    const Slot slot = Arrangement::bits(side, width, band.channels, token, channel);
    out[slot.byte] |= static_cast<std::uint8_t>(((code >> low) & ((1 << width) - 1)) << slot.shift);
    out += band.channels * kTileTokens * width / 8;
    low += width;
  }
}

// Block (tb, cb) of a band whose bytes at `out` were 0.
template <class Arrangement>
void put_block(Side side, const Band& band, int tb, int cb, const Block& block, std::uint8_t* out) {
  const bool tokens = lanes_are_tokens(side, band.code);
  for (int f = 0; f < 16; ++f) {
    for (int lane = 0; lane < 16; ++lane) {
      const int token = tb * 16 + (tokens ? lane : f), channel = cb * 16 + (tokens ? f : lane);
      put_code<Arrangement>(side, band, token, channel, static_cast<int>(block.field[f][lane]), out);
    }
  }
}

// ---- Lanes ----

// Codes of Width bits.
template <int Width>
SKVQ_FN void put_plane(const Block& block, std::uint8_t* out) {
  constexpr int kFields = 32 / Width;  // in a word of every lane
  for (int first = 0; first < 16; first += kFields) {
    for (int lane = 0; lane < 16; lane += kVector) {
      Ints words = {};
#pragma GCC unroll 16
      for (int f = 0; f < kFields; ++f) {
        words |= *reinterpret_cast<const Ints*>(&block.field[first + f][lane]) << (8 * (f % 4) + Width * (f / 4));
      }
      std::memcpy(out + first / kFields * 64 + 4 * lane, &words, sizeof words);
    }
  }
}

// Of each quad a mask, eight bytes at a time by a product that moves bit 0 of byte i to bit 56 + i, and no two others
// to the same place.
template <>
SKVQ_FN void put_plane<1>(const Block& block, std::uint8_t* out) {
  std::uint8_t quads[256];
  put_plane<8>(block, quads);
  for (int i = 0; i < 32; ++i) {
    std::uint64_t bytes;
    std::memcpy(&bytes, quads + 8 * i, sizeof bytes);
    out[i] = static_cast<std::uint8_t>(bytes * 0x0102040810204080u >> 56);
  }
}

// First byte of a block in the second plane of a code whose first plane has `low_width` bits.
SKVQ_FN int high_block(Side side, int low_width, int high_width, int channels, int tb, int cb) {
  return channels * kTileTokens * low_width / 8 + Lanes::block_offset(side, high_width, channels, tb, cb);
}

SKVQ_FN Block bits_of(const Block& block, int low, int width) {
  Block part;
  for (int f = 0; f < 16; ++f) {
    for (int lane = 0; lane < 16; ++lane) part.field[f][lane] = block.field[f][lane] >> low & ((1u << width) - 1);
  }
  return part;
}

template <int Low, int High>
void put_planes(Side side, const Band& band, int tb, int cb, const Block& block, std::uint8_t* out) {
  std::uint8_t* low = out + Lanes::block_offset(side, Low, band.channels, tb, cb);
  if constexpr (High == 0) {
    put_plane<Low>(block, low);
  } else {
    put_plane<Low>(bits_of(block, 0, Low), low);
    put_plane<High>(bits_of(block, Low, High), out + high_block(side, Low, High, band.channels, tb, cb));
  }
}

// Adds the trits of four tokens at a time, in bytes that stay under 243.
inline void put_trits(int tb, const Block& block, std::uint8_t* out) {
  for (int token = tb * 16; token < tb * 16 + 16; token += Lanes::kQuad) {
    const Slot first = Lanes::trit(16, token, 0);
    const std::uint32_t (*field)[16] = block.field + token % 16;
    if (Lanes::trit(16, token, 1).byte == first.byte + 1) {  // the last quad has its bytes alone
      for (int lane = 0; lane < 16; ++lane) {
        const std::uint32_t* trit = &field[0][lane];
        out[first.byte + lane] = static_cast<std::uint8_t>(trit[0] + 3 * trit[16] + 9 * trit[32] + 27 * trit[48]);
      }
      continue;
    }
    const std::uint32_t weight = power_of_three(first.shift);
    std::uint32_t words[16];
    std::memcpy(words, out + first.byte, sizeof words);
    for (int lane = 0; lane < 16; ++lane) {
      words[lane] += weight * (field[0][lane] | field[1][lane] << 8 | field[2][lane] << 16 | field[3][lane] << 24);
    }
    std::memcpy(out + first.byte, words, sizeof words);
  }
}

template <>
inline void put_block<Lanes>(Side side, const Band& band, int tb, int cb, const Block& block, std::uint8_t* out) {
  switch (band.code) {
    case Code::kInt8:
      return put_planes<8, 0>(side, band, tb, cb, block, out);
    case Code::kInt4:
      return put_planes<4, 0>(side, band, tb, cb, block, out);
    case Code::kInt3:
      return put_planes<2, 1>(side, band, tb, cb, block, out);
    case Code::kInt2:
    case Code::kTernaryFast:
      return put_planes<2, 0>(side, band, tb, cb, block, out);
    case Code::kTernary:
      return put_trits(tb, block, out + cb * Lanes::kTernaryBlockBytes);
  }
}

// ---- all ----

// Codes of one band, [channel][64 tokens], to bytes.
template <class Arrangement>
void pack_band(Side side, const Band& band, const std::uint8_t* codes, std::uint8_t* out) {
  std::memset(out, 0, tile_code_bytes(band.code, band.channels));
  const bool tokens = lanes_are_tokens(side, band.code);
  const int field_stride = tokens ? kTileTokens : 1, lane_stride = tokens ? 1 : kTileTokens;
  for (int cb = 0; cb < band.channels / 16; ++cb) {
    for (int tb = 0; tb < Lanes::kBlocks; ++tb) {
      const std::uint8_t* first = codes + cb * 16 * kTileTokens + tb * 16;
      Block block;
      for (int f = 0; f < 16; ++f) {
        for (int lane = 0; lane < 16; ++lane) block.field[f][lane] = first[f * field_stride + lane * lane_stride];
      }
      put_block<Arrangement>(side, band, tb, cb, block, out);
    }
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

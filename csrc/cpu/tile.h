// Codes of a tile into the bytes of a record and back, for every arrangement.
//
// `Rows` goes code by code through the arrangement's positions; `Lanes` moves blocks of 16 x 16 with vector
// instructions. Both give the same values (tests/cpp/test_tile.cpp).
#pragma once

#include <cstring>

#include "core/minifloat.h"
#include "cpu/vector.h"
#include "skvq/record.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// Where unpacked values go: K as [token block][channel][16 tokens], V as [token][channel].
SKVQ_FN int float_index(Side side, int head_dim, int token, int channel) {
  return side == Side::kKey ? ((token / 16) * head_dim + channel) * 16 + token % 16 : token * head_dim + channel;
}

// Codes of one band, [channel][64 tokens], to bytes and back, one by one.
template <class Arrangement>
void pack_band(Side side, const Band& band, const std::uint8_t* codes, std::uint8_t* out) {
  std::memset(out, 0, tile_code_bytes(band.code, band.channels));
  for (int c = 0; c < band.channels; ++c) {
    for (int t = 0; t < kTileTokens; ++t) {
      const int code = codes[c * kTileTokens + t];
      if (is_base3(band.code)) {
        const Slot slot = Arrangement::trit(band.channels, t, c);
        out[slot.byte] = static_cast<std::uint8_t>(out[slot.byte] + code * power_of_three(slot.shift));
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

template <class Arrangement>
int read_code(Side side, const Band& band, const std::uint8_t* in, int token, int channel) {
  if (is_base3(band.code)) {
    const Slot slot = Arrangement::trit(band.channels, token, channel);
    return in[slot.byte] / power_of_three(slot.shift) % 3;
  }
  int code = 0, low = 0;
  for (const int width : traits(band.code).plane_bits) {
    if (width == 0) continue;
    const Slot slot = Arrangement::bits(side, width, band.channels, token, channel);
    code |= (in[slot.byte] >> slot.shift & ((1 << width) - 1)) << low;
    in += band.channels * kTileTokens * width / 8;
    low += width;
  }
  return code;
}

// Subtracted from codes when they become floats, and given back to the zero: codes then sum to about nothing over a
// group, so that a sum does not lose its low bits to a constant part.
SKVQ_FN constexpr float code_centre(Code code) {
  return 0.5f * static_cast<float>(traits(code).levels - 1);
}

template <class Arrangement>
void unpack_band(Side side, const Band& band, int head_dim, const std::uint8_t* in, float* out) {
  const float centre = code_centre(band.code);
  for (int c = 0; c < band.channels; ++c) {
    for (int t = 0; t < kTileTokens; ++t) {
      out[float_index(side, head_dim, t, band.begin + c)] =
          static_cast<float>(read_code<Arrangement>(side, band, in, t, c)) - centre;
    }
  }
}

// ---- Lanes, a block of 16 tokens x 16 channels at a time ----

struct Block {
  std::uint32_t field[16][16];  // [field][lane]
};

// Words of 16 lanes; width 1 has 16-bit words.
template <int Width>
SKVQ_FN void load_words(const std::uint8_t* plane, int first, std::uint32_t* words) {
  if constexpr (Width == 1) {
    std::uint16_t half[16];
    std::memcpy(half, plane + first * 2, sizeof half);
    for (int lane = 0; lane < 16; ++lane) words[lane] = half[lane];
  } else {
    std::memcpy(words, plane + first * 4, 64);
  }
}

template <int Width>
SKVQ_FN void store_words(std::uint8_t* plane, int first, const std::uint32_t* words) {
  if constexpr (Width == 1) {
    std::uint16_t half[16];
    for (int lane = 0; lane < 16; ++lane) half[lane] = static_cast<std::uint16_t>(words[lane]);
    std::memcpy(plane + first * 2, half, sizeof half);
  } else {
    std::memcpy(plane + first * 4, words, 64);
  }
}

template <int Width>
SKVQ_FN void read_plane(Side side, int channels, int tb, int cb, int low, const std::uint8_t* plane, Block& block) {
  constexpr int kFields = Lanes::fields(Width);
  for (int w = 0; w < Lanes::words(Width); ++w) {
    std::uint32_t words[16];
    load_words<Width>(plane, Lanes::block(side, Width, channels, tb, cb, w), words);
    for (int f = 0; f < kFields; ++f) {
      const int shift = Lanes::field_shift(Width, f);
      for (int lane = 0; lane < 16; ++lane) {
        block.field[w * kFields + f][lane] |= ((words[lane] >> shift) & ((1u << Width) - 1)) << low;
      }
    }
  }
}

template <int Width>
SKVQ_FN void write_plane(Side side, int channels, int tb, int cb, int low, const Block& block, std::uint8_t* plane) {
  constexpr int kFields = Lanes::fields(Width);
  for (int w = 0; w < Lanes::words(Width); ++w) {
    std::uint32_t words[16] = {};
    for (int f = 0; f < kFields; ++f) {
      const int shift = Lanes::field_shift(Width, f);
      for (int lane = 0; lane < 16; ++lane) {
        words[lane] |= ((block.field[w * kFields + f][lane] >> low) & ((1u << Width) - 1)) << shift;
      }
    }
    store_words<Width>(plane, Lanes::block(side, Width, channels, tb, cb, w), words);
  }
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
      write_plane<Low>(side, band.channels, tb, cb, 0, block, out);
      if constexpr (High > 0)
        write_plane<High>(side, band.channels, tb, cb, Low, block, out + band.channels * kTileTokens * Low / 8);
    }
  }
}

template <int Low, int High>
void unpack_lanes(Side side, const Band& band, int head_dim, const std::uint8_t* in, float* out) {
  const float centre = code_centre(band.code);
  for (int tb = 0; tb < Lanes::kBlocks; ++tb) {
    for (int cb = 0; cb < band.channels / 16; ++cb) {
      Block block = {};
      read_plane<Low>(side, band.channels, tb, cb, 0, in, block);
      if constexpr (High > 0)
        read_plane<High>(side, band.channels, tb, cb, Low, in + band.channels * kTileTokens * Low / 8, block);
      const int channel = band.begin + cb * 16;
      for (int f = 0; f < 16; ++f) {
        float* row = out + (side == Side::kKey ? float_index(side, head_dim, tb * 16, channel + f)
                                               : float_index(side, head_dim, tb * 16 + f, channel));
        for (int lane = 0; lane < 16; ++lane)
          row[lane] = static_cast<float>(static_cast<std::int32_t>(block.field[f][lane])) - centre;
      }
    }
  }
}

inline void unpack_lanes_ternary(Side side, const Band& band, int head_dim, const std::uint8_t* in, float* out) {
  constexpr float kCentre = code_centre(Code::kTernary);
  for (int r = 0; r < kTernaryTileRows; ++r) {
    for (int cb = 0; cb < band.channels; cb += 16) {
      std::int32_t rest[16];
      for (int lane = 0; lane < 16; ++lane) rest[lane] = in[r * band.channels + cb + lane];
      for (int token = r; token < kTileTokens; token += kTernaryTileRows) {
        float trit[16];
        for (int lane = 0; lane < 16; ++lane) {
          const std::int32_t third = (rest[lane] * 171) >> 9;  // rest / 3, exact under 256
          trit[lane] = static_cast<float>(rest[lane] - 3 * third) - kCentre;
          rest[lane] = third;
        }
        for (int lane = 0; lane < 16; ++lane)
          out[float_index(side, head_dim, token, band.begin + cb + lane)] = trit[lane];
      }
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
      break;
  }
  for (int r = 0; r < kTernaryTileRows; ++r) {
    for (int c = 0; c < band.channels; ++c) {
      int value = 0;
      for (int digit = kTritsPerByte - 1; digit >= 0; --digit) {
        const int token = digit * kTernaryTileRows + r;
        value = value * 3 + (token < kTileTokens ? codes[c * kTileTokens + token] : 0);
      }
      out[r * band.channels + c] = static_cast<std::uint8_t>(value);
    }
  }
}

template <>
inline void unpack_band<Lanes>(Side side, const Band& band, int head_dim, const std::uint8_t* in, float* out) {
  switch (band.code) {
    case Code::kInt8:
      return unpack_lanes<8, 0>(side, band, head_dim, in, out);
    case Code::kInt4:
      return unpack_lanes<4, 0>(side, band, head_dim, in, out);
    case Code::kInt3:
      return unpack_lanes<2, 1>(side, band, head_dim, in, out);
    case Code::kInt2:
    case Code::kTernaryFast:
      return unpack_lanes<2, 0>(side, band, head_dim, in, out);
    case Code::kTernary:
      return unpack_lanes_ternary(side, band, head_dim, in, out);
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

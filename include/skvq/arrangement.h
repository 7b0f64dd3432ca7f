// Where a code, a trit or a scale lies inside its section of a record.
//
// An arrangement is a type with static functions and no state. Codes are equal in all arrangements and so are
// the sizes; only positions differ, so a record moves between backends by repacking.
#pragma once

#include "skvq/format.h"

namespace skvq {

enum class Side : std::uint8_t { kKey, kValue };
inline constexpr Side kSides[] = {Side::kKey, Side::kValue};
enum class ArrangementKind : std::uint8_t { kRows, kLanes };
inline constexpr const char* kArrangementNames[] = {"rows", "lanes"};

struct Slot {
  int byte;   // from the start of the band's plane
  int shift;  // lowest bit inside the byte; for trits the digit (base 3, lowest first)
};

// Token after token, channel after channel; trits channel after channel. The one that people and tests read.
struct Rows {
  static constexpr ArrangementKind kind = ArrangementKind::kRows;

  SKVQ_FN static constexpr Slot bits(Side, int width, int channels, int token, int channel) {
    const int bit = (token * channels + channel) * width;
    return {bit / 8, bit % 8};
  }
  SKVQ_FN static constexpr Slot trit(int /*channels*/, int token, int channel) {
    return {channel * kTernaryTileRows + token / kTritsPerByte, token % kTritsPerByte};
  }
  // Index of scale (which = 0) or zero (which = 1).
  SKVQ_FN static constexpr int meta(int groups, int token, int group, int which) {
    return (token * groups + group) * 2 + which;
  }
};

// For vector units: a block is 16 tokens x 16 channels, cut into 16 lanes of 32-bit words (16-bit for one-bit
// planes). Lanes are tokens for K (dot products need no sum across lanes) and channels for V. Inside a word
// neighbouring fields go to neighbouring bytes, so `(word >> width * j) & mask` leaves 4 fields as 4 bytes.
struct Lanes {
  static constexpr ArrangementKind kind = ArrangementKind::kLanes;
  static constexpr int kLanes = 16;
  static constexpr int kBlocks = kTileTokens / kLanes;  // blocks of tokens in a tile

  SKVQ_FN static constexpr int word_bytes(int width) { return width == 1 ? 2 : 4; }
  SKVQ_FN static constexpr int fields(int width) { return word_bytes(width) * 8 / width; }
  SKVQ_FN static constexpr int words(int width) { return 16 / fields(width); }  // words of a lane in a block

  // Bit of a field inside its word.
  SKVQ_FN static constexpr int field_shift(int width, int field) {
    return 8 * (field % word_bytes(width)) + width * (field / word_bytes(width));
  }
  // Index of the first lane's word.
  SKVQ_FN static constexpr int block(Side side, int width, int channels, int token_block, int channel_block, int word) {
    const int index =
        side == Side::kKey ? token_block * (channels / 16) + channel_block : channel_block * kBlocks + token_block;
    return (index * words(width) + word) * kLanes;
  }

  SKVQ_FN static constexpr Slot bits(Side side, int width, int channels, int token, int channel) {
    const int lane = side == Side::kKey ? token % 16 : channel % 16;
    const int field = side == Side::kKey ? channel % 16 : token % 16;
    const int word = block(side, width, channels, token / 16, channel / 16, field / fields(width)) + lane;
    const int shift = field_shift(width, field % fields(width));
    return {word * word_bytes(width) + shift / 8, shift % 8};
  }
  // Thirteen rows of one byte per channel; row r holds tokens r, r + 13, r + 26, ...
  SKVQ_FN static constexpr Slot trit(int channels, int token, int channel) {
    return {(token % kTernaryTileRows) * channels + channel, token / kTernaryTileRows};
  }
  SKVQ_FN static constexpr int meta(int /*groups*/, int token, int group, int which) {
    return (group * 2 + which) * kTileTokens + token;
  }
};

}  // namespace skvq

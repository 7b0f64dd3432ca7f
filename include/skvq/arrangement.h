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

// For vector units: a block is 16 tokens x 16 channels, 16 lanes of 16 fields. Lanes are tokens for K (dot products
// need no sum across lanes) and channels for V. Fields go in quads of four: a quad's fields are neighbouring bytes of
// its lane's 32-bit word, so that `(word >> width * q) & mask` is one operand of a four-way byte dot product. A plane
// of one bit holds, quad by quad, a 64-bit mask over the bytes of such a vector.
struct Lanes {
  static constexpr ArrangementKind kind = ArrangementKind::kLanes;
  static constexpr int kLanes = 16;
  static constexpr int kBlocks = kTileTokens / kLanes;  // blocks of tokens in a tile
  static constexpr int kQuad = 4;
  static constexpr int kTernaryBlockBytes = kTernaryTileRows * kLanes;

  SKVQ_FN static constexpr int block_bytes(int width) { return kLanes * kLanes * width / 8; }
  SKVQ_FN static constexpr int block_offset(Side side, int width, int channels, int token_block, int channel_block) {
    const int index =
        side == Side::kKey ? token_block * (channels / 16) + channel_block : channel_block * kBlocks + token_block;
    return index * block_bytes(width);
  }

  SKVQ_FN static constexpr Slot bits(Side side, int width, int channels, int token, int channel) {
    const int lane = side == Side::kKey ? token % 16 : channel % 16;
    const int field = side == Side::kKey ? channel % 16 : token % 16;
    const int block = block_offset(side, width, channels, token / 16, channel / 16);
    const int quad = field / kQuad, byte = lane * kQuad + field % kQuad;
    if (width == 1) return {block + quad * 8 + byte / 8, byte % 8};
    const int quads_per_word = 8 / width;
    return {block + quad / quads_per_word * 64 + byte, quad % quads_per_word * width};
  }

  // Sixteen channels: three 32-bit words a lane, whose digit k in word w holds the quad 3k + w of tokens, then one
  // byte a lane with the last quad.
  SKVQ_FN static constexpr Slot trit(int /*channels*/, int token, int channel) {
    const int block = channel / 16 * kTernaryBlockBytes, lane = channel % 16, quad = token / kQuad;
    if (quad == 15) return {block + 192 + lane, token % kQuad};
    return {block + (quad % 3 * kLanes + lane) * 4 + token % kQuad, quad / 3};
  }
  SKVQ_FN static constexpr int meta(int /*groups*/, int token, int group, int which) {
    return (group * 2 + which) * kTileTokens + token;
  }
};

}  // namespace skvq

// Where a code, a trit or a scale lies inside its section of a record.
//
// An arrangement is a type with static functions and no state. Codes are equal in all arrangements and so are
// the sizes; only positions differ, so a record moves between backends by repacking.
#pragma once

#include "skvq/format.h"

namespace skvq {

enum class Side : std::uint8_t { kKey, kValue };
inline constexpr Side kSides[] = {Side::kKey, Side::kValue};
enum class ArrangementKind : std::uint8_t { kRows, kLanes, kMma };
inline constexpr const char* kArrangementNames[] = {"rows", "lanes", "mma"};

struct Slot {
  int byte;   // from the start of the band's plane
  int shift;  // lowest bit inside the byte; for trits the digit (base 3, lowest first)
};

// Five trits t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4 as they are stored in a byte.
struct PlainTrits {
  SKVQ_FN static constexpr int to_byte(int trits) { return trits; }
  SKVQ_FN static constexpr int from_byte(int byte) { return byte; }
};

// As the fraction trits / 243 of 256, rounded up: tripling it pushes the next trit, the highest first, out at the top.
struct FractionTrits {
  SKVQ_FN static constexpr int to_byte(int trits) { return (trits * 256 + 242) / 243; }
  SKVQ_FN static constexpr int from_byte(int byte) { return byte * 243 / 256; }
};

// Token after token, channel after channel; trits channel after channel. The one that people and tests read.
struct Rows : PlainTrits {
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
struct Lanes : PlainTrits {
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

// For tensor cores: the A operand of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"), whose rows are the
// tokens of K and the channels of V. A band is cut into matrices of 16 tokens x 16 channels, matrix `u` holding tokens
// 16 * (u / blocks) and channels 16 * (u % blocks); of each, a lane of the warp owns 4 registers of 2 halves. The lanes
// keep their codes in 32-bit words: a word holds one register of several matrices, each code a field of both its
// halves at the same place, so that one AND with 0x00030003 << shift is an operand.
struct Mma : FractionTrits {
  static constexpr ArrangementKind kind = ArrangementKind::kMma;
  static constexpr int kLanes = 32;
  static constexpr int kRegisters = 4;
  static constexpr int kSteps = kTileTokens / 16;          // matrices in a column of channels
  static constexpr int kPairsPerWord = 2 * kTritsPerByte;  // trits go in pairs, one for each half of a register

  // Who holds element (row, column) of a 16 x 16 matrix, and the way back.
  struct Owner {
    int lane, reg, half;
  };
  struct Element {
    int row, column;
  };
  SKVQ_FN static constexpr Owner owner(int row, int column) {
    return {row % 8 * 4 + column % 8 / 2, row / 8 + column / 8 * 2, column % 2};
  }
  SKVQ_FN static constexpr Element element(int lane, int reg, int half) {
    return {lane / 4 + reg % 2 * 8, lane % 4 * 2 + half + reg / 2 * 8};
  }
  SKVQ_FN static constexpr Owner owner_of(Side side, int token, int channel) {
    return side == Side::kKey ? owner(token % 16, channel % 16) : owner(channel % 16, token % 16);
  }

  // A lane's words go in runs of four (one 16-byte load); what is left over in a run of two and a run of one.
  struct Run {
    int first, length;
  };
  SKVQ_FN static constexpr Run run_of(int words, int word) {
    const int whole = words / 4 * 4;
    if (word < whole) return {word / 4 * 4, 4};
    return words - whole >= 2 && word < whole + 2 ? Run{whole, 2} : Run{words - 1, 1};
  }
  SKVQ_FN static constexpr int word_offset(int words, int lane, int word) {
    const Run run = run_of(words, word);
    return (run.first * kLanes + lane * run.length + word - run.first) * 4;
  }

  // Where a lane finds its two codes of register `reg` of matrix `u`: `bit` and `bit` + 16 of a word. A run of n words
  // serves 4 n / width matrices; short runs hold more than one register in a word. Single bits lie two apart, like the
  // fields of the plane of two bits that they extend, so that one shift serves several matrices.
  struct Field {
    int word, bit;
  };
  SKVQ_FN static constexpr int plane_words(int width, int channels) { return channels / 16 * width; }
  SKVQ_FN static constexpr Field field(int width, int channels, int u, int reg) {
    const int words = plane_words(width, channels);
    const Run run = run_of(words, u * width / 4);
    const int matrices = run.length * 4 / width, v = u - run.first * 4 / width;
    const int index = v + reg / run.length * matrices;
    return {run.first + reg % run.length, width == 1 ? index % 8 * 2 + index / 8 : width * index};
  }

  SKVQ_FN static constexpr Slot bits(Side side, int width, int channels, int token, int channel) {
    const Owner o = owner_of(side, token, channel);
    const Field f = field(width, channels, token / 16 * (channels / 16) + channel / 16, o.reg);
    const int bit = f.bit + 16 * o.half;
    return {word_offset(plane_words(width, channels), o.lane, f.word) + bit / 8, bit % 8};
  }

  // Trits: pair `4 u + reg` of a lane. Ten pairs to a word: five in bytes 0 and 2, five in bytes 1 and 3. The pairs
  // that are left over have a word, the two bytes of half a word, or any digit of the bytes at the end.
  static constexpr Side kTritRows = Side::kValue;  // matrices of both sides have channels as rows
  SKVQ_FN static constexpr int trit_pairs(int channels) { return channels; }
  SKVQ_FN static constexpr int trit_words(int channels) {
    const int whole = trit_pairs(channels) / kPairsPerWord;
    return trit_tail_bytes(channels) == 4 * kLanes ? whole + 1 : whole;
  }
  SKVQ_FN static constexpr int trit_tail_bytes(int channels) {
    return kTernaryTileRows * channels - trit_pairs(channels) / kPairsPerWord * 4 * kLanes;
  }
  SKVQ_FN static constexpr Slot trit_of_pair(int channels, int lane, int pair, int half) {
    const int words = trit_words(channels), word = pair / kPairsPerWord, k = pair % kPairsPerWord;
    const int last = kTritsPerByte - 1;  // the first to be read is the highest digit
    if (word < words) {
      return {word_offset(words, lane, word) + k / kTritsPerByte + 2 * half, last - k % kTritsPerByte};
    }
    const int tail = words * 4 * kLanes;
    if (trit_tail_bytes(channels) == 2 * kLanes) return {tail + lane * 2 + half, last - k};
    const int index = (lane * (trit_pairs(channels) % kPairsPerWord) + k) * 2 + half;
    return {tail + index / kTritsPerByte, last - index % kTritsPerByte};
  }
  SKVQ_FN static constexpr Slot trit(int channels, int token, int channel) {
    const Owner o = owner_of(kTritRows, token, channel);
    const int u = token / 16 * (channels / 16) + channel / 16;
    return trit_of_pair(channels, o.lane, u * kRegisters + o.reg, o.half);
  }

  // What the lanes of one row need is contiguous, step by step and group by group: scale and zero of a token and of the
  // token eight later.
  SKVQ_FN static constexpr int meta(int groups, int token, int group, int which) {
    return ((token % 8 * kSteps + token / 16) * groups + group) * 4 + token % 16 / 8 * 2 + which;
  }
};

// Calls visit.template operator()<Arrangement>().
template <class F>
SKVQ_FN constexpr void visit_arrangement(ArrangementKind kind, F&& visit) {
  switch (kind) {
    case ArrangementKind::kRows:
      return visit.template operator()<Rows>();
    case ArrangementKind::kLanes:
      return visit.template operator()<Lanes>();
    case ArrangementKind::kMma:
      return visit.template operator()<Mma>();
  }
}

}  // namespace skvq

// The number formats of the packed cache, defined once.
//
// A head's channels form one or two *bands*, each with one code; a band is cut into *groups* of adjacent
// channels that share a scale and a zero per token. Sizes, arrangements, the Python layer, the documentation
// table and the tolerances of the tests are all derived from what stands here.
#pragma once

#include <cstdint>

#include "skvq/config.h"

namespace skvq {

inline constexpr int kTileTokens = 64;  // tokens of a tile = tokens of a page
inline constexpr int kBandUnit = 16;    // bands, and with them groups, start at multiples of this channel
inline constexpr int kMaxBands = 2;
inline constexpr int kMaxGroups = 18;        // head_dim 512 in groups of 32, plus one more per band boundary
inline constexpr int kTernaryTileRows = 13;  // 64 tokens of one channel, 5 trits to a byte
inline constexpr int kTritsPerByte = 5;

inline constexpr int kHeadDims[] = {64, 80, 96, 112, 128, 192, 256, 512};
inline constexpr int kGroupSizes[] = {32, 64, 128};
inline constexpr int kMaxHeadDim = 512;

enum class Code : std::uint8_t { kInt8, kInt4, kInt3, kInt2, kTernary, kTernaryFast };

// How the levels of a code are stored: bit planes (low plane first), or trits in base 3.
struct CodeTraits {
  Code code;
  const char* name;  // as it stands in a scheme string after k or v
  int levels;
  int plane_bits[2];  // widths of the bit planes; {0, 0} for base 3
};

// The one table; a function, because device code cannot index an array of the host.
SKVQ_FN constexpr CodeTraits traits(Code code) {
  switch (code) {
    case Code::kInt8:
      return {code, "8", 256, {8, 0}};
    case Code::kInt4:
      return {code, "4", 16, {4, 0}};
    case Code::kInt3:
      return {code, "3", 8, {2, 1}};
    case Code::kInt2:
      return {code, "2", 4, {2, 0}};
    case Code::kTernary:
      return {code, "1.5", 3, {0, 0}};
    case Code::kTernaryFast:
      return {code, "1.5fast", 3, {2, 0}};
  }
  return {};
}
inline constexpr CodeTraits kCodes[] = {traits(Code::kInt8), traits(Code::kInt4),    traits(Code::kInt3),
                                        traits(Code::kInt2), traits(Code::kTernary), traits(Code::kTernaryFast)};
SKVQ_FN constexpr bool is_base3(Code code) {
  return code == Code::kTernary;
}

// Bytes of the codes of one tile (64 tokens) of `channels` adjacent channels.
SKVQ_FN constexpr int tile_code_bytes(Code code, int channels) {
  return is_base3(code) ? kTernaryTileRows * channels
                        : (traits(code).plane_bits[0] + traits(code).plane_bits[1]) * channels * kTileTokens / 8;
}

// Bytes of `channels` codes of one token that start and end at a byte (uneven groups of a plain matrix).
SKVQ_FN constexpr int group_row_bytes(Code code, int channels) {
  if (is_base3(code)) return (channels + kTritsPerByte - 1) / kTritsPerByte;
  return (channels * traits(code).plane_bits[0] + 7) / 8 + (channels * traits(code).plane_bits[1] + 7) / 8;
}

SKVQ_FN constexpr int power_of_three(int digit) {
  int p = 1;
  for (int i = 0; i < digit; ++i) p *= 3;
  return p;
}

// Type of scale and zero. Both are stored divided by a static power of two per (layer, head), because E4M3
// flushes what lies under 2^-9 and saturates at 448.
enum class Meta : std::uint8_t { kE4m3, kFp16 };
SKVQ_FN constexpr int meta_bytes(Meta meta) {
  return meta == Meta::kE4m3 ? 1 : 2;
}
inline constexpr const char* kMetaNames[] = {"fp8", "fp16"};

struct Band {
  Code code;
  int begin;     // first channel
  int channels;  // multiple of kBandUnit
};

struct Group {
  int begin, end;  // channels
  int band;
};

// Format of K or of V for one head.
struct TensorFormat {
  int head_dim = 0;
  int group = 0;  // channels a group may span; the whole head where it is head_dim
  int num_bands = 0;
  Band bands[kMaxBands] = {};

  SKVQ_FN constexpr int band_groups(int band) const { return (bands[band].channels + group - 1) / group; }

  SKVQ_FN constexpr int num_groups() const {
    int n = 0;
    for (int b = 0; b < num_bands; ++b) n += band_groups(b);
    return n;
  }

  // The last group of a band is shorter where the group size does not divide the band.
  SKVQ_FN constexpr Group group_at(int index) const {
    int band = 0;
    while (index >= band_groups(band)) index -= band_groups(band++);
    const int begin = bands[band].begin + index * group;
    const int stop = bands[band].begin + bands[band].channels;
    return {begin, begin + group < stop ? begin + group : stop, band};
  }

  SKVQ_FN constexpr int code_bytes() const {
    int n = 0;
    for (int b = 0; b < num_bands; ++b) n += tile_code_bytes(bands[b].code, bands[b].channels);
    return n;
  }
};

}  // namespace skvq

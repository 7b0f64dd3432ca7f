// Every code and every scale has a place of its own inside its section.
#include <vector>

#include "support/formats.h"
#include "third_party/doctest.h"

namespace skvq {
namespace {

// Bits [begin, begin + count) become taken; false where one was taken already or lies outside.
bool take(std::vector<bool>& taken, int begin, int count) {
  for (int bit = begin; bit < begin + count; ++bit) {
    if (bit < 0 || bit >= static_cast<int>(taken.size()) || taken[bit]) return false;
    taken[bit] = true;
  }
  return true;
}

// As many bits as the plane has are handed out once each: a bijection.
template <class Arrangement>
bool plane_is_bijective(Side side, int width, int channels) {
  std::vector<bool> taken(channels * kTileTokens * width);
  for (int c = 0; c < channels; ++c) {
    for (int t = 0; t < kTileTokens; ++t) {
      const Slot slot = Arrangement::bits(side, width, channels, t, c);
      if (slot.shift < 0 || slot.shift + width > 8 || !take(taken, slot.byte * 8 + slot.shift, width)) return false;
    }
  }
  return true;
}

// 64 of a channel's 13 * 5 digits are used.
template <class Arrangement>
bool trits_are_distinct(int channels) {
  std::vector<bool> taken(tile_code_bytes(Code::kTernary, channels) * kTritsPerByte);
  for (int c = 0; c < channels; ++c) {
    for (int t = 0; t < kTileTokens; ++t) {
      const Slot slot = Arrangement::trit(channels, t, c);
      if (slot.shift < 0 || slot.shift >= kTritsPerByte || !take(taken, slot.byte * kTritsPerByte + slot.shift, 1))
        return false;
    }
  }
  return true;
}

template <class Arrangement>
bool meta_is_bijective(int groups) {
  std::vector<bool> taken(groups * kTileTokens * 2);
  for (int g = 0; g < groups; ++g) {
    for (int t = 0; t < kTileTokens; ++t) {
      for (const int which : {0, 1}) {
        if (!take(taken, Arrangement::meta(groups, t, g, which), 1)) return false;
      }
    }
  }
  return true;
}

template <class Arrangement>
void check_arrangement() {
  // Bands, unlike heads, have any multiple of 16 channels.
  for (int channels = kBandUnit; channels <= kMaxHeadDim; channels += kBandUnit) {
    CAPTURE(channels);
    CHECK(trits_are_distinct<Arrangement>(channels));
    for (const Side side : kSides) {
      for (const int width : {1, 2, 4, 8}) {
        CAPTURE(test::name(side));
        CAPTURE(width);
        CHECK(plane_is_bijective<Arrangement>(side, width, channels));
      }
    }
  }
  for (int groups = 1; groups <= kMaxGroups; ++groups) {
    CAPTURE(groups);
    CHECK(meta_is_bijective<Arrangement>(groups));
  }
}

TEST_SUITE_BEGIN("arrangement");

TEST_CASE("rows give every code and scale its own place") {
  check_arrangement<Rows>();
}
TEST_CASE("lanes give every code and scale its own place") {
  check_arrangement<Lanes>();
}

TEST_CASE("lanes hold a token of K and a channel of V per lane") {
  for (const int width : {2, 4, 8}) {
    for (int lane = 0; lane < Lanes::kLanes; ++lane) {
      CHECK(Lanes::bits(Side::kKey, width, 128, lane, 0).byte == lane * 4);
      CHECK(Lanes::bits(Side::kValue, width, 128, 0, lane).byte == lane * 4);
    }
  }
}

TEST_CASE("the fields of a quad are neighbouring bytes") {
  for (const int width : {2, 4, 8}) {
    for (int field = 0; field < 16; ++field) {
      const Slot first = Lanes::bits(Side::kKey, width, 128, 3, field / 4 * 4);
      const Slot slot = Lanes::bits(Side::kKey, width, 128, 3, field);
      CHECK(slot.byte == first.byte + field % 4);
      CHECK(slot.shift == first.shift);
    }
  }
}

TEST_CASE("a plane of one bit is a mask over the bytes of a quad's vector") {
  for (int lane = 0; lane < 16; ++lane) {
    for (int field = 0; field < 16; ++field) {
      const Slot slot = Lanes::bits(Side::kKey, 1, 128, lane, field);
      CHECK(slot.byte * 8 + slot.shift == field / 4 * 64 + lane * 4 + field % 4);
    }
  }
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

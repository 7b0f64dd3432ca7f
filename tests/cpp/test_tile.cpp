// Codes into bytes and back, for both arrangements.
#include <vector>

#include "cpu/repack_kernel.h"
#include "cpu/tile.h"
#include "support/formats.h"
#include "third_party/doctest.h"

namespace skvq::cpu {
namespace {

constexpr std::uint8_t kGuard = 0xee;

// Packed bytes of a band with guard bytes after them.
template <class Arrangement>
std::vector<std::uint8_t> pack(Side side, const Band& band, const std::vector<std::uint8_t>& codes) {
  std::vector<std::uint8_t> bytes(tile_code_bytes(band.code, band.channels) + 64, kGuard);
  pack_band<Arrangement>(side, band, codes.data(), bytes.data());
  return bytes;
}

bool guard_is_intact(const std::vector<std::uint8_t>& bytes) {
  for (std::size_t i = bytes.size() - 64; i < bytes.size(); ++i) {
    if (bytes[i] != kGuard) return false;
  }
  return true;
}

template <class Arrangement>
int wrong_codes(Side side, const Band& band, const std::vector<std::uint8_t>& codes,
                const std::vector<std::uint8_t>& bytes) {
  int wrong = 0;
  for (int c = 0; c < band.channels; ++c) {
    for (int t = 0; t < kTileTokens; ++t) {
      wrong += read_code<Arrangement>(side, band, bytes.data(), t, c) != codes[c * kTileTokens + t];
    }
  }
  return wrong;
}

template <class Arrangement>
void check_round_trip() {
  for (const CodeTraits& t : kCodes) {
    for (const Side side : kSides) {
      for (const int channels : {16, 48, 64, 128, 512}) {
        const Band band{t.code, 32, channels};
        const auto codes = test::random_codes(t.code, channels * kTileTokens, channels);
        const auto bytes = pack<Arrangement>(side, band, codes);
        CAPTURE(t.name);
        CAPTURE(test::name(side));
        CAPTURE(channels);
        CHECK(guard_is_intact(bytes));
        CHECK(wrong_codes<Arrangement>(side, band, codes, bytes) == 0);
      }
    }
  }
}

TEST_SUITE_BEGIN("tile");

TEST_CASE("rows round-trip every code") {
  check_round_trip<Rows>();
}
TEST_CASE("lanes round-trip every code") {
  check_round_trip<Lanes>();
}

TEST_CASE("the extreme codes do not touch their neighbours") {
  for (const CodeTraits& t : kCodes) {
    for (const Side side : kSides) {
      const Band band{t.code, 0, 32};
      std::vector<std::uint8_t> codes(32 * kTileTokens);
      for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = (i + i / kTileTokens) % 2 ? t.levels - 1 : 0;
      CAPTURE(t.name);
      CHECK(wrong_codes<Rows>(side, band, codes, pack<Rows>(side, band, codes)) == 0);
      CHECK(wrong_codes<Lanes>(side, band, codes, pack<Lanes>(side, band, codes)) == 0);
    }
  }
}

TEST_CASE("ternary bytes stay below 243") {
  for (const Side side : kSides) {
    const Band band{Code::kTernary, 0, 64};
    auto bytes = pack<Lanes>(side, band, std::vector<std::uint8_t>(64 * kTileTokens, 2));
    bytes.resize(bytes.size() - 64);
    for (const std::uint8_t byte : bytes) REQUIRE(byte <= 242);
  }
}

TEST_CASE("trits become codes of two bits") {
  for (const Side side : kSides) {
    for (const int channels : {16, 48, 128, 512}) {
      const Band trits{Code::kTernary, 0, channels}, fast{Code::kTernaryFast, 0, channels};
      const auto codes = test::random_codes(Code::kTernary, channels * kTileTokens, channels);
      auto widened = std::vector<std::uint8_t>(tile_code_bytes(Code::kTernaryFast, channels) + 64, kGuard);
      widen_trits(side, channels, pack<Lanes>(side, trits, codes).data(), widened.data());
      CAPTURE(test::name(side));
      CAPTURE(channels);
      CHECK(guard_is_intact(widened));
      CHECK(wrong_codes<Lanes>(side, fast, codes, widened) == 0);
    }
  }
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq::cpu

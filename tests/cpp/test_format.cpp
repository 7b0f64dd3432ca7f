// Sizes and groups of every format, and what the parser refuses.
#include <stdexcept>

#include "support/formats.h"
#include "third_party/doctest.h"

namespace skvq {
namespace {

constexpr int kSectionAlignment = 16;  // bytes a vector unit loads at once

RecordFormat record(const std::string& k, const std::string& v, int group, int head_dim,
                    const std::string& meta = "fp8") {
  return parse_record_format(k, v, group, meta, "lanes", head_dim);
}

bool aligned(const RecordFormat& f) {
  bool ok = f.record_bytes() % kSectionAlignment == 0;
  for (const Side side : kSides) {
    ok &= f.codes_offset(side) % kSectionAlignment == 0 && f.meta_offset(side) % kSectionAlignment == 0;
    for (int b = 0; b < f.side(side).num_bands; ++b) ok &= f.band_offset(side, b) % kSectionAlignment == 0;
  }
  return ok;
}

// Groups follow each other without gaps, none leaves its band or is larger than asked for.
bool groups_tile_the_bands(const TensorFormat& f) {
  int next = 0;
  for (int g = 0; g < f.num_groups(); ++g) {
    const Group group = f.group_at(g);
    const Band& band = f.bands[group.band];
    if (group.begin != next || group.end <= group.begin || group.end - group.begin > f.group) return false;
    if (group.begin < band.begin || group.end > band.begin + band.channels || group.begin % kBandUnit != 0)
      return false;
    next = group.end;
  }
  return next == f.head_dim && f.num_groups() <= kMaxGroups;
}

std::string message(const std::string& k, int group, const std::string& meta, const std::string& arrangement,
                    int head_dim) {
  try {
    parse_record_format(k, "2", group, meta, arrangement, head_dim);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST_SUITE_BEGIN("format");

TEST_CASE("headline records have the published sizes") {
  CHECK(record("2", "2", 128, 128).record_bytes() == 4352);
  CHECK(record("2", "1.5", 128, 128).record_bytes() == 3968);
  CHECK(record("2", "2", 32, 128).record_bytes() == 4352 + 2 * 3 * 2 * 64);
  CHECK(record("2", "2", 128, 128, "fp16").record_bytes() == 4352 + 2 * 2 * 64);
  CHECK(record("8", "8", 0, 64).record_bytes() == 2 * (64 * 64 + 2 * 64));
}

TEST_CASE("stored bits of every code") {
  const double bits[] = {8, 4, 3, 2, 1.625, 2};
  for (const CodeTraits& t : kCodes) {
    CAPTURE(t.name);
    CHECK(tile_code_bytes(t.code, 128) * 8.0 / (128 * kTileTokens) == bits[static_cast<int>(t.code)]);
    CHECK(parse_code(t.name) == t.code);
  }
}

TEST_CASE("sections are multiples of 16 bytes and groups tile the bands for every format") {
  for (const int head_dim : kHeadDims) {
    for (const std::string& text : test::tensor_formats(head_dim)) {
      for (const int group : test::groups_or_head()) {
        for (const char* meta : kMetaNames) {
          const RecordFormat f = record(text, "1.5", group, head_dim, meta);
          if (aligned(f) && groups_tile_the_bands(f.k)) continue;
          FAIL_CHECK("head_dim " << head_dim << " k" << text << " group " << group << " " << meta);
        }
      }
    }
  }
}

TEST_CASE("sections of a record follow each other") {
  const RecordFormat f = record("3:1/2+2", "4:1/4+1.5", 32, 128, "fp16");
  CHECK(f.codes_offset(Side::kKey) == 0);
  CHECK(f.band_offset(Side::kKey, 1) == 64 * 64 * 3 / 8);
  CHECK(f.meta_offset(Side::kKey) == f.band_offset(Side::kKey, 1) + 64 * 64 * 2 / 8);
  CHECK(f.codes_offset(Side::kValue) == f.meta_offset(Side::kKey) + f.meta_section_bytes(Side::kKey));
  CHECK(f.band_offset(Side::kValue, 1) == f.codes_offset(Side::kValue) + 32 * 64 * 4 / 8);
  CHECK(f.record_bytes() == f.meta_offset(Side::kValue) + f.meta_section_bytes(Side::kValue));
}

TEST_CASE("a group longer than a band is the band") {
  const RecordFormat f = record("3:1/2+2", "2", 128, 128);
  REQUIRE(f.k.num_groups() == 2);
  CHECK(f.k.group_at(0).end == 64);
  CHECK(f.k.group_at(1).band == 1);
  CHECK(record("2", "2", 128, 64).k.num_groups() == 1);
  CHECK(record("2", "2", 0, 192).k.num_groups() == 1);
}

TEST_CASE("what is refused is named together with what is possible") {
  CHECK(contains(message("5", 128, "fp8", "lanes", 128), "\"5\" is unknown; possible are \"8\", \"4\""));
  CHECK(contains(message("2", 48, "fp8", "lanes", 128), "group 48 is not supported; supported are 32, 64, 128"));
  CHECK(contains(message("2", 128, "bf16", "lanes", 128), "\"bf16\" is unknown; possible are \"fp8\", \"fp16\""));
  CHECK(contains(message("2", 128, "fp8", "tiles", 128), "\"tiles\" is unknown; possible are \"rows\", \"lanes\""));
  CHECK(contains(message("2", 128, "fp8", "lanes", 100), "head_dim 100 is not supported; supported are 64, 80"));
  CHECK(contains(message("3:1/2", 128, "fp8", "lanes", 128), "two bands are written WIDTH:NUM/DEN+WIDTH"));
  CHECK(contains(message("3:1/2+2", 128, "fp8", "lanes", 80), "a band is a multiple of 16 channels"));
  CHECK(contains(message("3:2/2+2", 128, "fp8", "lanes", 128), "smaller than the head"));
  CHECK(contains(message("3:1/0+2", 128, "fp8", "lanes", 128), "expected a positive number, found \"0\""));
  CHECK(contains(message("3:x/2+2", 128, "fp8", "lanes", 128), "expected a positive number, found \"x\""));
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

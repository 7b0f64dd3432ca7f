#include "core/format_text.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <stdexcept>

namespace skvq {
namespace {

template <class Range, class Name>
std::string join(const Range& range, Name&& name) {
  std::string text;
  for (const auto& item : range) text += (text.empty() ? "" : ", ") + name(item);
  return text;
}

std::string quoted(std::string_view text) {
  return concat('"', text, '"');
}
std::string number(int n) {
  return std::to_string(n);
}

template <class T, std::size_t N>
T parse_name(const char* const (&names)[N], std::string_view text, const char* what) {
  const auto found = std::find(std::begin(names), std::end(names), text);
  if (found == std::end(names)) {
    throw std::invalid_argument(concat(what, " \"", text, "\" is unknown; possible are ",
                                       join(names, [](const char* n) { return quoted(n); })));
  }
  return static_cast<T>(found - std::begin(names));
}

int parse_int(std::string_view text, std::string_view whole) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value <= 0) {
    throw std::invalid_argument(concat("format \"", whole, "\": expected a positive number, found \"", text, "\""));
  }
  return value;
}

// "2", or "3:1/2+2": the first half of the channels at 3 bits, the rest at 2.
TensorFormat parse_tensor_format(std::string_view text, int group, int head_dim) {
  TensorFormat format;
  format.head_dim = head_dim;
  format.group = group == 0 ? head_dim : group;
  const std::size_t colon = text.find(':');
  if (colon == std::string_view::npos) {
    format.num_bands = 1;
    format.bands[0] = {parse_code(text), 0, head_dim};
    return format;
  }
  const std::size_t slash = text.find('/', colon), plus = text.find('+', colon);
  if (slash == std::string_view::npos || plus == std::string_view::npos || plus < slash) {
    throw std::invalid_argument(
        concat("format \"", text, "\": two bands are written WIDTH:NUM/DEN+WIDTH, for example 3:1/2+2"));
  }
  const int num = parse_int(text.substr(colon + 1, slash - colon - 1), text);
  const int den = parse_int(text.substr(slash + 1, plus - slash - 1), text);
  const int first = head_dim * num / den;
  if (num >= den || first * den != head_dim * num || first % kBandUnit != 0) {
    throw std::invalid_argument(concat("format \"", text, "\": ", num, "/", den, " of head_dim ", head_dim,
                                       " channels is not a band; a band is a multiple of ", kBandUnit,
                                       " channels and smaller than the head"));
  }
  format.num_bands = 2;
  format.bands[0] = {parse_code(text.substr(0, colon)), 0, first};
  format.bands[1] = {parse_code(text.substr(plus + 1)), first, head_dim - first};
  return format;
}

std::string tensor_json(const TensorFormat& f) {
  std::string bands, groups;
  for (int b = 0; b < f.num_bands; ++b) {
    const Band& band = f.bands[b];
    bands +=
        concat(b ? ", " : "", "{\"code\": \"", traits(band.code).name, "\", \"levels\": ", traits(band.code).levels,
               ", \"begin\": ", band.begin, ", \"end\": ", band.begin + band.channels, "}");
  }
  for (int g = 0; g < f.num_groups(); ++g) {
    const Group group = f.group_at(g);
    groups += concat(g ? ", " : "", "[", group.begin, ", ", group.end, "]");
  }
  return concat("{\"bands\": [", bands, "], \"groups\": [", groups, "]}");
}

}  // namespace

Code parse_code(std::string_view text) {
  const auto found =
      std::find_if(std::begin(kCodes), std::end(kCodes), [&](const CodeTraits& t) { return t.name == text; });
  if (found == std::end(kCodes)) {
    throw std::invalid_argument(concat("number format \"", text, "\" is unknown; possible are ",
                                       join(kCodes, [](const CodeTraits& t) { return quoted(t.name); })));
  }
  return found->code;
}

Meta parse_meta(std::string_view text) {
  return parse_name<Meta>(kMetaNames, text, "scale and zero type");
}

RecordFormat parse_record_format(std::string_view k, std::string_view v, int group, std::string_view meta,
                                 std::string_view arrangement, int head_dim) {
  if (std::find(std::begin(kHeadDims), std::end(kHeadDims), head_dim) == std::end(kHeadDims)) {
    throw std::invalid_argument(
        concat("head_dim ", head_dim, " is not supported; supported are ", join(kHeadDims, number)));
  }
  if (group != 0 && std::find(std::begin(kGroupSizes), std::end(kGroupSizes), group) == std::end(kGroupSizes)) {
    throw std::invalid_argument(concat("group ", group, " is not supported; supported are ", join(kGroupSizes, number),
                                       " and 0 for the whole head"));
  }
  RecordFormat format;
  format.k = parse_tensor_format(k, group, head_dim);
  format.v = parse_tensor_format(v, group, head_dim);
  format.meta = parse_meta(meta);
  format.arrangement = parse_name<ArrangementKind>(kArrangementNames, arrangement, "arrangement");
  return format;
}

std::string format_table() {
  std::string codes;
  for (const CodeTraits& t : kCodes) {
    const double bits = tile_code_bytes(t.code, kBandUnit) * 8.0 / (kTileTokens * kBandUnit);
    codes += concat(codes.empty() ? "" : ", ", "{\"name\": \"", t.name, "\", \"levels\": ", t.levels,
                    ", \"bits\": ", bits, ", \"planes\": [", t.plane_bits[0], ", ", t.plane_bits[1], "]}");
  }
  return concat("{\"tile_tokens\": ", kTileTokens, ", \"band_unit\": ", kBandUnit, ", \"codes\": [", codes,
                "], \"head_dims\": [", join(kHeadDims, number), "], \"groups\": [", join(kGroupSizes, number),
                "], \"metas\": [", join(kMetaNames, [](const char* n) { return quoted(n); }), "], \"arrangements\": [",
                join(kArrangementNames, [](const char* n) { return quoted(n); }), "]}");
}

std::string describe(const RecordFormat& f) {
  return concat("{\"record_bytes\": ", f.record_bytes(), ", \"k_codes\": ", f.codes_offset(Side::kKey),
                ", \"k_meta\": ", f.meta_offset(Side::kKey), ", \"v_codes\": ", f.codes_offset(Side::kValue),
                ", \"v_meta\": ", f.meta_offset(Side::kValue), ", \"k\": ", tensor_json(f.k),
                ", \"v\": ", tensor_json(f.v), "}");
}

}  // namespace skvq

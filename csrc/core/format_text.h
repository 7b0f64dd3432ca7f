// Formats as text: parsing what a user wrote, and the table that Python and the documentation read.
#pragma once

#include <sstream>
#include <string>
#include <string_view>

#include "skvq/record.h"

namespace skvq {

template <class... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// `group` is 32, 64, 128 or 0 for the whole head; a group never leaves its band.
// Throws std::invalid_argument naming what is wrong and what is possible.
RecordFormat parse_record_format(std::string_view k, std::string_view v, int group, std::string_view meta,
                                 std::string_view arrangement, int head_dim);
Code parse_code(std::string_view text);
Meta parse_meta(std::string_view text);

// JSON: codes with levels, stored bits and planes; supported head_dims, groups, metas, arrangements; tile size.
std::string format_table();
// JSON: record bytes, section offsets, bands and groups of one format.
std::string describe(const RecordFormat& format);

}  // namespace skvq

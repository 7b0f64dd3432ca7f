// Results as JSON.
#pragma once

#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "core/format_text.h"

namespace skvq::bench {

inline std::string json_text(std::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      (quoted += '\\') += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      quoted += escape;
    } else {
      quoted += c;
    }
  }
  return quoted += '"';
}

// An object under construction; members keep their order.
class Json {
 public:
  template <class T>
  Json& add(std::string_view name, const T& value) {
    members_ += concat(members_.empty() ? "" : ", ", json_text(name), ": ", text_of(value));
    return *this;
  }
  std::string text() const { return "{" + members_ + "}"; }

 private:
  static std::string text_of(const Json& value) { return value.text(); }
  static std::string text_of(const std::vector<Json>& values) {
    std::string text = "[";
    for (const Json& value : values) text += (text.size() > 1 ? ",\n  " : "\n  ") + value.text();
    return text + "\n]";
  }
  template <class T>
  static std::string text_of(const T& value) {
    if constexpr (std::is_same_v<T, bool>) {
      return value ? "true" : "false";
    } else if constexpr (std::is_floating_point_v<T>) {
      return std::isfinite(value) ? concat(value) : "null";  // JSON knows no infinity
    } else if constexpr (std::is_arithmetic_v<T>) {
      return std::to_string(value);
    } else {
      return json_text(value);
    }
  }

  std::string members_;
};

inline void write_json(const std::string& path, const Json& value) {
  std::ofstream out(path);
  out << value.text() << "\n";
  if (!out.flush()) throw std::runtime_error(concat("cannot write ", path, ": is its folder there?"));
}

}  // namespace skvq::bench

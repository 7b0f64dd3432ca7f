// Command lines: options with values, comma-separated lists and switches.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "core/format_text.h"

namespace skvq::bench {

inline std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(separator, begin), text.size());
    parts.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

inline int parse_number(std::string_view option, std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) {
    throw std::invalid_argument(concat(option, ": expected a number of 0 or more, found \"", text, "\""));
  }
  return value;
}

inline std::vector<int> parse_numbers(std::string_view option, std::string_view text) {
  std::vector<int> values;
  for (const std::string& part : split(text, ',')) values.push_back(parse_number(option, part));
  return values;
}

inline void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// The options of a program and where their values go. What is bound must outlive `parse`.
class Arguments {
 public:
  using Setter = std::function<void(std::string_view name, std::string_view value)>;

  Arguments& value(std::string_view name, Setter setter) {
    setters_[name] = std::move(setter);
    return *this;
  }
  Arguments& text(std::string_view name, std::string& to) {
    return value(name, [&to](auto, auto text) { to = text; });
  }
  Arguments& texts(std::string_view name, std::vector<std::string>& to) {
    return value(name, [&to](auto, auto text) { to = split(text, ','); });
  }
  Arguments& number(std::string_view name, int& to) {
    return value(name, [&to](auto option, auto text) { to = parse_number(option, text); });
  }
  Arguments& numbers(std::string_view name, std::vector<int>& to) {
    return value(name, [&to](auto option, auto text) { to = parse_numbers(option, text); });
  }
  // One of two words; `to` becomes whether it was the first.
  Arguments& either(std::string_view name, std::string_view yes, std::string_view no, bool& to) {
    return value(name, [=, &to](auto option, auto text) {
      if (text != yes && text != no) {
        throw std::invalid_argument(concat(option, ": expected ", yes, " or ", no, ", found \"", text, "\""));
      }
      to = text == yes;
    });
  }
  Arguments& flag(std::string_view name, bool& to) {
    flags_[name] = &to;
    return *this;
  }

  // Throws std::invalid_argument for an unknown option, a missing value or a value of the wrong kind.
  void parse(int argc, char** argv) const {
    for (int i = 1; i < argc; ++i) {
      if (const auto flag = flags_.find(argv[i]); flag != flags_.end()) {
        *flag->second = true;
        continue;
      }
      const auto found = setters_.find(argv[i]);
      if (found == setters_.end())
        throw std::invalid_argument(concat("unknown option ", argv[i], "; --help lists them"));
      if (i + 1 == argc) throw std::invalid_argument(concat(argv[i], " needs a value"));
      found->second(argv[i], argv[i + 1]);
      ++i;
    }
  }

 private:
  std::map<std::string_view, Setter> setters_;
  std::map<std::string_view, bool*> flags_;
};

// The main function of a program: --help prints `usage`; an exception is its message and exit status 1.
template <class F>
int run_program(const char* name, const char* usage, int argc, char** argv, F&& body) {
  if (argc == 2 && std::string_view(argv[1]) == "--help") {
    std::fputs(usage, stdout);
    return 0;
  }
  try {
    return body();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return 1;
  }
}

}  // namespace skvq::bench

// Command line: axes are comma-separated lists, and every combination of their values is measured.
#pragma once

#include <algorithm>
#include <charconv>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "core/format_text.h"

namespace skvq::bench {

struct Scheme {
  std::string k, v;
};

struct Options {
  std::vector<std::string> ops = {"append", "decode"};
  std::vector<Scheme> schemes = {{"2", "1.5"}};
  std::vector<int> heads = {8}, ratios = {4}, head_dims = {128}, contexts = {4096, 32768}, groups = {128},
                   threads = {1};
  std::string meta = "fp8", arrangement = "lanes", dtype = "bf16", json;
  bool exact = true;
  int append_tokens = kTileTokens, window = 128, sinks = 5, warmup = 3, repetitions = 15, working_set_mib = 0;
};

inline constexpr const char* kUsage = R"(bench_cpu: time append and decode_attention of the packed cache on the CPU

axes (comma-separated, every combination is measured)
  --op LIST         append, decode                                   [append,decode]
  --scheme LIST     formats of K and V, e.g. k8-v8,k3:1/2+2-v1.5     [k2-v1.5]
  --group LIST      channels per group: 32, 64, 128 or 0 = head      [128]
  --head-dim LIST                                                    [128]
  --heads LIST      KV heads                                         [8]
  --ratio LIST      query heads per KV head                          [4]
  --context LIST    cached tokens                                    [4096,32768]
  --threads LIST                                                     [1]

settings
  --meta fp8|fp16            type of scales and zeros                [fp8]
  --arrangement lanes|rows                                           [lanes]
  --dtype f32|f16|bf16       queries, window and new tokens          [bf16]
  --math exact|integer       how packed tiles are read               [exact]
  --append-tokens N          tokens of one append call               [64]
  --window N, --sinks N      tokens kept in full precision           [128, 5]
  --warmup N, --reps N       calls before and in the measurement     [3, 15]
  --working-set MIB          caches to rotate over hold at least this much, 0: twice the last-level cache  [0]
  --json FILE                also write the results as JSON

SKVQ_CPU_ISA=portable|avx2|avx512 chooses the instruction set.
)";

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

inline Scheme parse_scheme(const std::string& text) {
  const std::size_t v = text.find("-v");
  if (text.empty() || text[0] != 'k' || v == std::string::npos) {
    throw std::invalid_argument(
        concat("--scheme: expected formats of K and V, for example k2-v1.5, found \"", text, "\""));
  }
  return {text.substr(1, v - 1), text.substr(v + 2)};
}

inline std::vector<Scheme> parse_schemes(std::string_view text) {
  std::vector<Scheme> schemes;
  for (const std::string& part : split(text, ',')) schemes.push_back(parse_scheme(part));
  return schemes;
}

// Throws std::invalid_argument for an unknown option, a missing value or a value of the wrong kind.
inline Options parse_options(int argc, char** argv) {
  Options o;
  using Setter = std::function<void(std::string_view name, std::string_view value)>;
  const auto text = [](std::string& to) -> Setter { return [&](auto, auto value) { to = value; }; };
  const auto texts = [](std::vector<std::string>& to) -> Setter {
    return [&](auto, auto value) { to = split(value, ','); };
  };
  const auto number = [](int& to) -> Setter { return [&](auto name, auto value) { to = parse_number(name, value); }; };
  const auto numbers = [](std::vector<int>& to) -> Setter {
    return [&](auto name, auto value) { to = parse_numbers(name, value); };
  };
  const std::map<std::string_view, Setter> setters = {
      {"--op", texts(o.ops)},
      {"--scheme", [&](auto, auto value) { o.schemes = parse_schemes(value); }},
      {"--group", numbers(o.groups)},
      {"--head-dim", numbers(o.head_dims)},
      {"--heads", numbers(o.heads)},
      {"--ratio", numbers(o.ratios)},
      {"--context", numbers(o.contexts)},
      {"--threads", numbers(o.threads)},
      {"--meta", text(o.meta)},
      {"--arrangement", text(o.arrangement)},
      {"--dtype", text(o.dtype)},
      {"--math",
       [&](auto name, auto value) {
         if (value != "exact" && value != "integer") {
           throw std::invalid_argument(concat(name, ": expected exact or integer, found \"", value, "\""));
         }
         o.exact = value == "exact";
       }},
      {"--append-tokens", number(o.append_tokens)},
      {"--window", number(o.window)},
      {"--sinks", number(o.sinks)},
      {"--warmup", number(o.warmup)},
      {"--reps", number(o.repetitions)},
      {"--working-set", number(o.working_set_mib)},
      {"--json", text(o.json)},
  };
  for (int i = 1; i < argc; i += 2) {
    const auto found = setters.find(argv[i]);
    if (found == setters.end()) throw std::invalid_argument(concat("unknown option ", argv[i], "; --help lists them"));
    if (i + 1 == argc) throw std::invalid_argument(concat(argv[i], " needs a value"));
    found->second(argv[i], argv[i + 1]);
  }
  return o;
}

}  // namespace skvq::bench

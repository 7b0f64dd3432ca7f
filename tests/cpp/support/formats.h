// Every tensor format that can be written down, and helpers that many tests share.
#pragma once

#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "core/format_text.h"

namespace skvq::test {

inline constexpr ArrangementKind kArrangements[] = {ArrangementKind::kRows, ArrangementKind::kLanes,
                                                    ArrangementKind::kMma};
inline const char* name(Side side) {
  return side == Side::kKey ? "K" : "V";
}
inline const char* name(ArrangementKind kind) {
  return kArrangementNames[static_cast<int>(kind)];
}

// One band of each code, and each pair of codes split at every possible channel.
inline std::vector<std::string> tensor_formats(int head_dim) {
  std::vector<std::string> texts;
  const int units = head_dim / kBandUnit;
  for (const CodeTraits& first : kCodes) {
    texts.push_back(first.name);
    for (const CodeTraits& rest : kCodes) {
      for (int unit = 1; unit < units; ++unit) {
        texts.push_back(concat(first.name, ":", unit, "/", units, "+", rest.name));
      }
    }
  }
  return texts;
}

// A sample of them for tests that run kernels.
inline constexpr const char* kSampleFormats[] = {"8", "4", "3", "2", "1.5", "1.5fast", "3:1/2+2", "4:1/4+1.5"};

inline std::vector<int> groups_or_head() {
  std::vector<int> groups(std::begin(kGroupSizes), std::end(kGroupSizes));
  groups.push_back(0);
  return groups;
}

inline std::vector<std::uint8_t> random_codes(Code code, int count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<std::uint8_t> codes(count);
  for (auto& c : codes) c = static_cast<std::uint8_t>(generator() % traits(code).levels);
  return codes;
}

inline std::vector<float> random_floats(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& f : x) f = normal(generator);
  return x;
}

}  // namespace skvq::test

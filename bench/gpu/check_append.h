// cuda::append against cpu::append, byte for byte, for every format that can be written.
#pragma once

#include <string>
#include <vector>

#include "gpu/twin.h"

namespace skvq::bench {

struct CheckOptions {
  bool small = false, poison = true;
};

// Lengths at which something changes: nothing, sinks, window, tiles.
inline std::vector<int> edge_lengths(const Shape& s) {
  const int packed = s.sinks + s.window;  // tokens before the first tile is packed, and that tile's
  return {0,           1,           s.sinks - 1, s.sinks,      s.sinks + 1, packed - 1,   packed,         packed + 1,
          packed + 63, packed + 64, packed + 65, packed + 128, packed + 3,  packed + 300, packed + 64 * 9};
}

inline bool exists(const Shape& s) {
  try {
    (void)s.format();
    return true;
  } catch (const std::invalid_argument&) {
    return false;  // bands that this head_dim cannot be cut into
  }
}

// A prompt of every edge length, then steps of many kinds, each compared.
inline std::string append_difference(Shape s, const CheckOptions& o, bool single_tokens, cudaStream_t stream) {
  std::vector<int> counts = edge_lengths(s);
  s.batch = static_cast<int>(counts.size());
  Twin twin(s, o.poison);
  std::vector<std::vector<int>> calls = {counts, std::vector<int>(counts.size(), 1)};
  for (std::size_t i = 0; i < counts.size(); ++i) counts[i] = static_cast<int>(i * i % 70);
  calls.push_back(counts);
  for (int step = 0; single_tokens && step < 66; ++step) calls.emplace_back(counts.size(), step % 5 == 4 ? 2 : 1);
  for (std::size_t call = 0; call < calls.size(); ++call) {
    NewTokens(s, calls[call], static_cast<unsigned>(call) * 2 + 1).append(twin, stream);
    const bool last = call + 1 == calls.size();
    if (call < 3 || last) {
      if (const std::string difference = twin.difference(); !difference.empty()) {
        return concat(s.text(), ", call ", call, ": ", difference);
      }
    }
  }
  return "";
}

// One finding for each head_dim.
inline void check_append(Findings& findings, const CheckOptions& o, cudaStream_t stream) {
  const std::vector<Scheme> schemes = {
      {"2", "2"}, {"2", "1.5"},       {"1.5", "3"},       {"3", "1.5fast"},       {"4", "8"},
      {"8", "4"}, {"1.5fast", "1.5"}, {"3:1/2+2", "1.5"}, {"4:1/4+2", "3:1/2+2"}, {"8:1/4+1.5", "4:1/2+1.5fast"}};
  constexpr int groups[] = {32, 64, 128, 0};
  constexpr DType dtypes[] = {DType::kF32, DType::kF16, DType::kBf16};
  for (const int head_dim : kHeadDims) {
    if (o.small && head_dim != 64 && head_dim != 128) continue;
    Tally tally;
    for (std::size_t i = 0; i < schemes.size(); ++i) {
      for (std::size_t g = 0; g < std::size(groups); ++g) {
        Shape s;
        s.scheme = schemes[i];
        s.group = groups[g];
        s.head_dim = head_dim;
        s.dtype = dtypes[(i + g) % 3];  // over schemes and groups every pair of group and type occurs
        s.meta = (i + g) % 2 == 0 ? "fp8" : "fp16";
        if (!exists(s) || (o.small && s.dtype != DType::kBf16)) continue;
        const bool single_tokens = s.dtype == DType::kBf16 && !o.small;
        const std::string difference = append_difference(s, o, single_tokens, stream);
        tally.check(difference.empty(), difference);
      }
    }
    findings.add(concat("append, bytes, head_dim ", head_dim), tally.ok(), tally.text(), tally.figures());
  }
}

}  // namespace skvq::bench

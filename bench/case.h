// What is measured: one operation on one shape of cache, and the bytes it must move.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "core/window.h"

namespace skvq::bench {

struct Scheme {
  std::string k, v;
};

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

inline DType parse_dtype(const std::string& name) {
  if (name == "f32") return DType::kF32;
  if (name == "f16") return DType::kF16;
  if (name == "bf16") return DType::kBf16;
  throw std::invalid_argument(concat("--dtype \"", name, "\" is unknown; possible are f32, f16, bf16"));
}

struct Case {
  std::string op;
  Scheme scheme;
  int group, head_dim, heads, ratio, context;
  RecordFormat format;
  DType dtype;
  int append_tokens, window, sinks;
  int batch = 1, q_len = 1;
  int rollback = 64;

  int tiles() const { return packed_tiles(context, sinks, window); }
  // One token of all KV heads, of K or of V.
  std::int64_t row_bytes() const { return static_cast<std::int64_t>(heads) * head_dim * dtype_bytes(dtype); }
  std::int64_t page_bytes() const { return static_cast<std::int64_t>(heads) * format.record_bytes(); }
};

// What an append of `tokens` tokens to each sequence of `old_len` must read and write: the new rows once, rows of the
// ring that are packed now, the rows that stay in sinks and ring, and the records.
inline std::int64_t append_bytes(const Case& c, int old_len, int tokens) {
  const int new_len = old_len + tokens;
  const int old_packed = packed_len(old_len, c.sinks, c.window), new_packed = packed_len(new_len, c.sinks, c.window);
  const int from_ring = max_int(0, min_int(old_len, c.sinks + new_packed) - c.sinks - old_packed);
  const int kept_from = max_int(old_len, ring_begin(new_len, c.sinks, ring_slots(c.window, c.rollback)));
  const int to_sinks = max_int(0, min_int(c.sinks, new_len) - old_len);
  const int to_ring = max_int(0, new_len - max_int(kept_from, c.sinks));
  const std::int64_t rows =
      static_cast<std::int64_t>(tokens) + (new_packed > old_packed ? from_ring : 0) + to_sinks + to_ring;
  return c.batch * (2 * c.row_bytes() * rows + (new_packed - old_packed) / kTileTokens * c.page_bytes());
}

// Every record and every row in full precision once, queries and outputs.
inline std::int64_t decode_bytes(const Case& c) {
  const std::int64_t tail = c.context - c.tiles() * static_cast<std::int64_t>(kTileTokens);
  return c.batch * (c.tiles() * c.page_bytes() + 2 * c.row_bytes() * tail + 2 * c.row_bytes() * c.ratio * c.q_len);
}

// Calls f with every combination of one value of each axis, the last one changing fastest.
template <class F>
void each_combination(F&& f) {
  f();
}
template <class F, class T, class... Axes>
void each_combination(F&& f, const std::vector<T>& axis, const Axes&... rest) {
  for (const T& value : axis) each_combination([&](const auto&... others) { f(value, others...); }, rest...);
}

}  // namespace skvq::bench

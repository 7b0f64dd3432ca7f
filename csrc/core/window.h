// The state of a sequence as a pure function of its length: [sinks | packed tiles | window].
//
// The first `sinks` tokens and the last `window` or a few more stay in full precision; whole tiles in between
// are packed. Nothing depends on how the tokens arrived. The ring keeps `rollback` tokens more than the window
// needs, so that the last tokens can be taken back, and so that several queries in one call each see exactly
// what they would see in single steps.
#pragma once

#include "skvq/cache.h"

namespace skvq {

struct TokenRange {
  int begin, end;  // positions
};

SKVQ_FN int min_int(int a, int b) {
  return a < b ? a : b;
}
SKVQ_FN int max_int(int a, int b) {
  return a > b ? a : b;
}

SKVQ_FN int packed_tiles(int kv_len, int sinks, int window) {
  return max_int(0, kv_len - sinks - window) / kTileTokens;
}
SKVQ_FN int packed_len(int kv_len, int sinks, int window) {
  return packed_tiles(kv_len, sinks, window) * kTileTokens;
}

// Slots a ring needs: a window, a tile that is not complete yet, and what may be taken back.
SKVQ_FN constexpr int ring_slots(int window, int rollback) {
  return window + kTileTokens + rollback;
}

// First position the ring holds once kv_len tokens were appended.
SKVQ_FN int ring_begin(int kv_len, int sinks, int slots) {
  return max_int(min_int(sinks, kv_len), kv_len - slots);
}

// End of the packed tokens (as a position) for a query at `position` when the cache holds kv_len tokens: that of
// a single step, as long as the ring still holds the rows after it. A query beyond the cache sees what is packed.
SKVQ_FN int packed_end(const CacheView& c, int position, int kv_len) {
  const int single_step = packed_tiles(min_int(position + 1, kv_len), c.num_sinks, c.window);
  const int missing = kv_len - c.ring_slots - c.num_sinks;  // tokens after the sinks that left the ring
  const int kept = missing > 0 ? (missing + kTileTokens - 1) / kTileTokens : 0;
  return c.num_sinks + kTileTokens * max_int(single_step, kept);
}

// Positions a query may see; empty ranges have end <= begin.
SKVQ_FN TokenRange visible(int position, int kv_len, int sliding_window) {
  return {sliding_window > 0 ? max_int(0, position - sliding_window + 1) : 0, min_int(position + 1, kv_len)};
}

}  // namespace skvq

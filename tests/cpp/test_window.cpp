// The state of a sequence as a function of its length, against a machine that takes one token at a time.
#include <algorithm>
#include <vector>

#include "core/window.h"
#include "third_party/doctest.h"

namespace skvq {
namespace {

constexpr int kLongest = 1000;

struct Config {
  int sinks, window, rollback;
};

std::vector<Config> configs() {
  std::vector<Config> all;
  for (const int sinks : {0, 1, 5, 64, 70}) {
    for (const int window : {0, 1, 63, 128}) {
      for (const int rollback : {0, 1, 16, 64}) all.push_back({sinks, window, rollback});
    }
  }
  return all;
}

// Whenever the tokens after sinks and packed tiles are a window and a whole tile, the oldest tile is packed.
std::vector<int> tiles_of_single_steps(const Config& c) {
  std::vector<int> tiles_at = {0};
  int tiles = 0, waiting = 0;
  for (int len = 1; len <= kLongest; ++len) {
    if (len > c.sinks) ++waiting;
    if (waiting == c.window + kTileTokens) {
      ++tiles;
      waiting -= kTileTokens;
    }
    tiles_at.push_back(tiles);
  }
  return tiles_at;
}

// What the ring's slots hold while tokens are appended and taken back.
class Machine {
 public:
  explicit Machine(const Config& config)
      : config_(config),
        tiles_at_(tiles_of_single_steps(config)),
        slots_(ring_slots(config.window, config.rollback), -1) {
    view_.num_sinks = config.sinks;
    view_.window = config.window;
    view_.ring_slots = static_cast<int>(slots_.size());
  }

  int kv_len() const { return kv_len_; }
  // As many as may be taken back, counted from the longest the sequence has been.
  int takeable() const { return kv_len_ - std::max(0, longest_ - config_.rollback); }

  // False where a tile is packed whose rows are neither in the ring nor among the new tokens.
  bool append(int count) {
    bool ok = true;
    for (int tile = tiles_at_[kv_len_]; tile < tiles_at_[kv_len_ + count]; ++tile) {
      const int first = config_.sinks + tile * kTileTokens;
      for (int p = first; p < std::min(first + kTileTokens, kv_len_); ++p) ok &= holds(p);
    }
    for (int p = kv_len_; p < kv_len_ + count; ++p) {
      if (p >= config_.sinks) slots_[p % slots_.size()] = p;
    }
    kv_len_ += count;
    longest_ = std::max(longest_, kv_len_);
    return ok;
  }

  void take_back(int count) { kv_len_ -= count; }

  bool holds(int position) const { return slots_[position % slots_.size()] == position; }

  // First position from which on the ring holds everything.
  int intact() const {
    int first = kv_len_;
    while (first > config_.sinks && holds(first - 1)) --first;
    return first;
  }

  // The last `count` tokens as queries of one call: each reads packed tiles that exist and rows that the ring
  // holds, and for no more than rollback + 1 queries exactly what it would read in a single step.
  bool queries_see_single_steps(int count) const {
    const int ring_from = intact(), last_tile = config_.sinks + kTileTokens * tiles_at_[kv_len_];
    for (int position = kv_len_ - count; position < kv_len_; ++position) {
      const int end = packed_end(view_, position, kv_len_);
      if (end > last_tile || (end < ring_from && ring_from > config_.sinks)) return false;
      const int single_step = config_.sinks + kTileTokens * tiles_at_[position + 1];
      if (count <= config_.rollback + 1 && end != single_step) return false;
    }
    return true;
  }

  const CacheView& view() const { return view_; }

 private:
  Config config_;
  std::vector<int> tiles_at_;
  std::vector<int> slots_;  // position in each slot
  CacheView view_{};
  int kv_len_ = 0, longest_ = 0;
};

#define CAPTURE_CONFIG(c) INFO("sinks ", (c).sinks, " window ", (c).window, " rollback ", (c).rollback)

TEST_SUITE_BEGIN("window");

TEST_CASE("packed tiles follow from the length alone") {
  for (const Config& c : configs()) {
    CAPTURE_CONFIG(c);
    const std::vector<int> tiles_at = tiles_of_single_steps(c);
    for (int len = 0; len <= kLongest; ++len) {
      REQUIRE(packed_tiles(len, c.sinks, c.window) == tiles_at[len]);
      REQUIRE(packed_len(len, c.sinks, c.window) == kTileTokens * tiles_at[len]);
    }
  }
}

TEST_CASE("the ring holds what queries need at every length") {
  for (const Config& c : configs()) {
    CAPTURE_CONFIG(c);
    Machine machine(c);
    for (int len = 1; len <= kLongest; ++len) {
      REQUIRE(machine.append(1));
      REQUIRE(ring_begin(len, c.sinks, machine.view().ring_slots) == machine.intact());
      for (const int count : {1, 2, c.rollback, c.rollback + 1, c.rollback + 2, 2 * c.rollback + 70, len}) {
        if (count <= len) REQUIRE(machine.queries_see_single_steps(count));
      }
    }
  }
}

TEST_CASE("the ring is never short while tokens are taken back and appended again") {
  for (const Config& c : configs()) {
    CAPTURE_CONFIG(c);
    Machine machine(c);
    unsigned random = 12345;
    const auto below = [&](int n) {
      random = random * 1664525u + 1013904223u;
      return static_cast<int>((random >> 8) % static_cast<unsigned>(n));
    };
    for (int step = 0; step < 400; ++step) {
      const int taken = below(std::min(machine.takeable(), machine.kv_len()) + 1);
      machine.take_back(taken);
      const int room = kLongest - machine.kv_len();
      const int count = 1 + below(step % 10 == 0 ? 200 : c.rollback + 1);
      if (count > room) break;
      REQUIRE(machine.append(count));
      REQUIRE(machine.queries_see_single_steps(count));
    }
    CHECK(machine.kv_len() > 400);
  }
}

TEST_CASE("everything may be taken back while nothing was overwritten") {
  for (const Config& c : configs()) {
    CAPTURE_CONFIG(c);
    Machine machine(c);
    REQUIRE(machine.append(std::min(kLongest, c.sinks + c.window + kTileTokens - 1)));
    CHECK(packed_tiles(machine.kv_len(), c.sinks, c.window) == 0);
    CHECK(machine.intact() == std::min(c.sinks, machine.kv_len()));
  }
}

TEST_CASE("queries beyond the cache see all that is packed") {
  CacheView view{};
  view.num_sinks = 5;
  view.window = 32;
  view.ring_slots = ring_slots(32, 16);
  for (int len = 0; len <= kLongest; ++len) {
    for (const int ahead : {0, 1, 100}) {
      REQUIRE(packed_end(view, len + ahead, len) == 5 + packed_len(len, 5, 32));
    }
  }
}

TEST_CASE("visible positions") {
  CHECK(visible(9, 10, 0).begin == 0);
  CHECK(visible(9, 10, 0).end == 10);
  CHECK(visible(4, 10, 0).end == 5);
  CHECK(visible(9, 10, 4).begin == 6);
  CHECK(visible(9, 10, 100).begin == 0);
  CHECK(visible(20, 10, 4).begin == 17);  // a window that has left the cache behind: empty
  CHECK(visible(20, 10, 4).end == 10);
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

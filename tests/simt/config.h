// How kernels are run: the order of threads, the time at which copies arrive, the device that is played.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "simt/sanitizers.h"

namespace simt {

// A kernel that broke a rule: which, where, and which thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a collective is called.
struct Location {
  const char* file;
  unsigned line;

  static constexpr Location current(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
    return {file, line};
  }
};

// Which of the threads that can go on does. Greedy: one warp as far as it gets, then another by chance.
enum class Order : std::uint8_t { kInOrder, kReverse, kRandom, kWarpGreedy };
inline constexpr const char* kOrderNames[] = {"in-order", "reverse", "random", "warp-greedy"};
// When asynchronous copies arrive: when they are waited for, at once, or one or the other by chance.
enum class Async : std::uint8_t { kLate, kEarly, kRandom };
inline constexpr const char* kAsyncNames[] = {"late", "early", "random"};

struct Config {
  Order order = Order::kInOrder;
  Async async = Async::kLate;
  std::uint64_t seed = 1;
  int multiprocessors = 3;
  std::size_t stack_bytes = std::size_t{256} << 10;  // of a thread
  // A __syncthreads, __syncwarp or wait for an mbarrier that is left out, to see what it is there for.
  char skipped_file[64] = "";
  unsigned skipped_line = 0;
};

template <class Enum, std::size_t N>
Enum choice_from_environment(const char* variable, const char* const (&names)[N], Enum otherwise) {
  const char* text = std::getenv(variable);
  if (text == nullptr) return otherwise;
  std::string possible;
  for (std::size_t i = 0; i < N; ++i) {
    if (std::strcmp(text, names[i]) == 0) return static_cast<Enum>(i);
    possible += std::string(i == 0 ? "" : ", ") + names[i];
  }
  throw Error(std::string(variable) + ": expected one of " + possible + "; found \"" + text + "\"");
}

inline unsigned long long number_of(const char* variable, const char* text) {
  char* end = nullptr;
  const unsigned long long number = std::strtoull(text, &end, 10);
  if (end == text || *end != '\0') {
    throw Error(std::string(variable) + ": expected a number, found \"" + text + "\"");
  }
  return number;
}

inline void skip_from_environment(Config& c) {
  const char* text = std::getenv("SKVQ_SIMT_SKIP");
  if (text == nullptr) return;
  const char* colon = std::strrchr(text, ':');
  const std::size_t length = colon == nullptr ? 0 : static_cast<std::size_t>(colon - text);
  if (length == 0 || length >= sizeof c.skipped_file) {
    throw Error(std::string("SKVQ_SIMT_SKIP: expected file:line, for example ring.cuh:78; found \"") + text + "\"");
  }
  std::memcpy(c.skipped_file, text, length);
  c.skipped_line = static_cast<unsigned>(number_of("SKVQ_SIMT_SKIP", colon + 1));
}

inline Config config_from_environment() {
  Config c;
  c.order = choice_from_environment("SKVQ_SIMT_ORDER", kOrderNames, c.order);
  c.async = choice_from_environment("SKVQ_SIMT_ASYNC", kAsyncNames, c.async);
  if (const char* text = std::getenv("SKVQ_SIMT_SEED")) c.seed = number_of("SKVQ_SIMT_SEED", text);
  skip_from_environment(c);
  return c;
}

inline Config& config() {
  static Config c = config_from_environment();
  return c;
}

class Random {
 public:
  constexpr Random() : Random(1) {}
  constexpr explicit Random(std::uint64_t seed) : state_((seed + 1) * 0x9e3779b97f4a7c15ull ^ 0x139408dcbbf7a44ull) {}
  SIMT_RUNTIME std::uint32_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<std::uint32_t>(state_ * 0x2545f4914f6cdd1dull >> 32);
  }
  SIMT_RUNTIME std::uint32_t below(std::uint32_t n) {
    return static_cast<std::uint32_t>(std::uint64_t{next()} * n >> 32);
  }
  SIMT_RUNTIME bool coin() { return (next() & 1) != 0; }

 private:
  std::uint64_t state_;
};

}  // namespace simt

// Wall-clock timing of a repeated call: warm-up, then N samples; minimum and median.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <utility>
#include <vector>

namespace skvq::bench {

struct Timing {
  double min_s, median_s;
};

inline Timing summarize(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const std::size_t n = samples.size();
  return {samples[0], 0.5 * (samples[(n - 1) / 2] + samples[n / 2])};
}

// `body(i)` is called with i = 0, 1, 2, ..., warm-up included, so that it can rotate over buffers; `prepare(i)` runs
// before it and outside the clock.
template <class Prepare, class Body>
Timing measure(int warmup, int repetitions, Prepare&& prepare, Body&& body) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> samples;
  for (int i = 0; i < warmup + repetitions; ++i) {
    prepare(i);
    const auto start = Clock::now();
    body(i);
    const std::chrono::duration<double> elapsed = Clock::now() - start;
    if (i >= warmup) samples.push_back(elapsed.count());
  }
  return summarize(std::move(samples));
}

// Clock of the core that runs this, in cycles per second, from multiplications that wait for each other: three cycles
// each on x86-64. The fastest of several tries.
inline double core_frequency() {
  constexpr int kProducts = 1 << 22, kTries = 8;
  volatile std::uint64_t seed = 3;
  const std::uint64_t factor = seed;
  const Timing timing = measure(
      1, kTries, [](int) {},
      [&](int) {
        std::uint64_t x = seed;
        for (int i = 0; i < kProducts; ++i) x *= factor;
        seed = x | 1;
      });
  return 3.0 * kProducts / timing.min_s;
}

}  // namespace skvq::bench

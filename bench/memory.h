// What the machine can do: size of its last-level cache and bandwidth of reading memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "thread_pool.h"
#include "timing.h"

namespace skvq::bench {

// Bytes; 32 MiB where the system does not say. Read from sysfs and not from sysconf, which names the cache of the
// whole host on some virtual machines.
inline std::size_t last_level_cache_bytes() {
  std::size_t largest = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    std::size_t kib = 0;
    if (file >> kib) largest = std::max(largest, kib << 10);
  }
  return largest > 0 ? largest : std::size_t{32} << 20;
}

// Bytes per second of summing a buffer of eight times the last-level cache on the threads of the pool, from the
// fastest repetition.
inline double read_bandwidth(int repetitions) {
  constexpr std::size_t kChunk = 1 << 15;  // words
  const std::size_t chunks = 8 * last_level_cache_bytes() / sizeof(std::uint64_t) / kChunk;
  const std::vector<std::uint64_t> buffer(chunks * kChunk, 1);
  std::atomic<std::uint64_t> total{0};
  const auto read = [&](int) {
    cpu::for_each(kPool, static_cast<std::int64_t>(chunks), cpu::kShortWork, [&](std::int64_t chunk) {
      std::uint64_t sum[8] = {};
      const std::uint64_t* words = buffer.data() + chunk * kChunk;
      for (std::size_t i = 0; i < kChunk; i += 8) {
        for (int lane = 0; lane < 8; ++lane) sum[lane] += words[i + lane];
      }
      for (const std::uint64_t s : sum) total += s;
    });
  };
  const Timing t = measure(1, repetitions, [](int) {}, read);
  return static_cast<double>(buffer.size() * sizeof(std::uint64_t)) / t.min_s;
}

}  // namespace skvq::bench

// A `Parallel` of N threads that hands out indices one by one.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace skvq::test {

template <int N>
void run_on_threads(std::int64_t count, void* closure, cpu::Parallel::Body body) {
  std::atomic<std::int64_t> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < N; ++i) {
    threads.emplace_back([&] {
      for (std::int64_t index = next++; index < count; index = next++) body(closure, index);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

template <int N>
inline constexpr cpu::Parallel kThreads{run_on_threads<N>};

}  // namespace skvq::test

// Launching small kernels in tests of the emulator.
#pragma once

#include <vector>

#include "cuda/ptx.cuh"
#include "third_party/doctest.h"

namespace simt::selftest {

// What the threads of one grid write to out[global index], as the kernel computes it.
template <class T, class... Arguments>
std::vector<T> results(void (*kernel)(T* out, Arguments...), int blocks, int threads, Arguments... arguments) {
  std::vector<T> out(static_cast<std::size_t>(blocks) * threads, T{});
  launch(kernel, blocks, threads, 0, out.data(), arguments...);
  return out;
}

SKVQ_DEVICE int global_index() {
  return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// Restores the configuration at the end of a test.
class Configured {
 public:
  Configured(Order order, Async async, std::uint64_t seed) : before_(config()) {
    config().order = order;
    config().async = async;
    config().seed = seed;
  }
  ~Configured() { config() = before_; }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;

 private:
  Config before_;
};

}  // namespace simt::selftest

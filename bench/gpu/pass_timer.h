// Time of calls on the device, by events. A pass is a row of calls over rotating buffers; a kernel that spins goes
// first, so that all calls of a pass are queued before the clock starts and the host's own time is not in it.
#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

#include "cuda/launch.cuh"
#include "gpu/runtime.h"
#include "timing.h"

namespace skvq::bench {

[[maybe_unused]] static __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

struct Passes {
  int warmup, repetitions, calls;
};

struct GpuTiming {
  Timing device;  // of one call
  double host_s;  // that the host needs to enqueue one call, from the fastest pass
};

class PassTimer {
 public:
  // `clock_hz`: of the multiprocessors, for the length of the spinning.
  PassTimer(cudaStream_t stream, double clock_hz) : stream_(stream), clock_hz_(clock_hz) {}

  // `prepare()` is enqueued before each pass and outside the clock; `enqueue(i)` is call i of a pass.
  template <class Prepare, class Enqueue>
  GpuTiming time(const Passes& p, Prepare&& prepare, Enqueue&& enqueue) const {
    double host = 0.0;
    for (int i = 0; i < std::max(1, p.warmup); ++i) {
      prepare();
      host = enqueue_all(p.calls, enqueue);
      cuda_check(cudaStreamSynchronize(stream_), "waiting for the device");
    }
    const auto delay = static_cast<long long>(std::min(1.5 * host + 5e-5, 0.1) * clock_hz_);
    std::vector<double> samples;
    for (int i = 0; i < p.repetitions; ++i) {
      prepare();
      cuda::launch("spin", spin, {1}, 1, 0, stream_, delay);
      start_.record(stream_);
      host = std::min(host, enqueue_all(p.calls, enqueue));
      stop_.record(stream_);
      samples.push_back(stop_.seconds_since(start_) / p.calls);
    }
    return {summarize(std::move(samples)), host / p.calls};
  }

 private:
  template <class Enqueue>
  static double enqueue_all(int calls, Enqueue&& enqueue) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) enqueue(i);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  cudaStream_t stream_;
  double clock_hz_;
  Event start_, stop_;
};

}  // namespace skvq::bench

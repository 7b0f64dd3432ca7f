// What the memory of the device can do: the yardstick for everything else in the same run.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "gpu/device.h"
#include "gpu/random.h"

namespace skvq::bench {

inline constexpr int kStreamThreads = 512;
inline constexpr int kStreamUnroll = 4;  // 16-byte words in flight per thread

// Blocks walk over the buffer together; `count` is a multiple of kStreamThreads * kStreamUnroll.
[[maybe_unused]] static __global__ void copy_words(const uint4* __restrict__ from, uint4* __restrict__ to,
                                                   std::int64_t count) {
  const std::int64_t tile = std::int64_t{kStreamThreads} * kStreamUnroll;
  for (std::int64_t first = blockIdx.x * tile; first < count; first += gridDim.x * tile) {
    uint4 words[kStreamUnroll];
    for (int i = 0; i < kStreamUnroll; ++i) words[i] = __ldcs(from + first + i * kStreamThreads + threadIdx.x);
    for (int i = 0; i < kStreamUnroll; ++i) __stcs(to + first + i * kStreamThreads + threadIdx.x, words[i]);
  }
}

// Stores what random words hardly ever come to, so that the compiler must keep the loads.
[[maybe_unused]] static __global__ void read_words(const uint4* __restrict__ from, uint4* __restrict__ to,
                                                   std::int64_t count) {
  const std::int64_t tile = std::int64_t{kStreamThreads} * kStreamUnroll;
  unsigned bits = 0;
  for (std::int64_t first = blockIdx.x * tile; first < count; first += gridDim.x * tile) {
    uint4 words[kStreamUnroll];
    for (int i = 0; i < kStreamUnroll; ++i) words[i] = __ldcs(from + first + i * kStreamThreads + threadIdx.x);
    for (int i = 0; i < kStreamUnroll; ++i) bits ^= words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
  }
  if (bits == 0x9e3779b9u) to[0].x = bits;
}

struct Bandwidth {
  double copy_kernel, copy_engine, read;  // bytes per second, read and written ones counted

  double copy() const { return std::max(copy_kernel, copy_engine); }
};

inline Bandwidth measure_bandwidth(const Device& device, cudaStream_t stream, int repetitions) {
  const std::size_t tile = std::size_t{kStreamThreads} * kStreamUnroll * sizeof(uint4);
  const std::size_t wanted = std::max<std::size_t>(std::size_t{1} << 30, 8 * device.l2_bytes);
  const std::size_t bytes = std::min(wanted, free_bytes() / 3) / tile * tile;
  const DeviceBytes from(bytes), to(bytes);
  fill_random(from, stream);
  fill_random(to, stream);
  const auto count = static_cast<std::int64_t>(bytes / sizeof(uint4));
  const PassTimer timer(stream, device.peak_clock_hz);
  const auto fastest = [&](auto&& enqueue) { return timer.time({2, repetitions, 1}, [] {}, enqueue).device.min_s; };
  const auto best_grid = [&](const char* name, void (*kernel)(const uint4*, uint4*, std::int64_t)) {
    double best = fastest([&](int) {  // one tile for each block
      cuda::launch(name, kernel, {static_cast<std::int64_t>(bytes / tile)}, kStreamThreads, 0, stream, from.as<uint4>(),
                   to.as<uint4>(), count);
    });
    for (const int blocks : {2, 4}) {  // blocks that stay
      best = std::min(best, fastest([&](int) {
                        cuda::launch(name, kernel, {device.multiprocessors * blocks}, kStreamThreads, 0, stream,
                                     from.as<uint4>(), to.as<uint4>(), count);
                      }));
    }
    return best;
  };
  const double engine = fastest([&](int) {
    cuda_check(cudaMemcpyAsync(to.bytes(), from.bytes(), bytes, cudaMemcpyDeviceToDevice, stream), "copying");
  });
  const double moved = static_cast<double>(bytes);
  return {2 * moved / best_grid("copy_words", copy_words), 2 * moved / engine,
          moved / best_grid("read_words", read_words)};
}

inline Json to_json(const Bandwidth& b) {
  return Json()
      .add("copy_bytes_per_s", b.copy())
      .add("copy_kernel_bytes_per_s", b.copy_kernel)
      .add("copy_engine_bytes_per_s", b.copy_engine)
      .add("read_bytes_per_s", b.read);
}

}  // namespace skvq::bench

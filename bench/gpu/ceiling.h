// The ceiling of the decode kernel: records of a few KB brought to shared memory by warps that have rings of their own,
// by asynchronous copies and without any arithmetic.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"
#include "gpu/bandwidth.h"
#include "gpu/findings.h"

namespace skvq::bench {

inline constexpr int kCeilingWarps = 4;  // of a block

struct CeilingShape {
  int record_bytes, stages, warps;  // warps per multiprocessor
  bool bulk;                        // cp.async.bulk, else 16 bytes a lane by cp.async
  bool scattered;                   // records in an order far from that of their addresses, as pages come

  std::string name() const {
    return concat(bulk ? "bulk" : "16 bytes", " ", record_bytes, " B x ", stages, " stages, ", warps, " warps",
                  scattered ? ", scattered" : "");
  }
  std::size_t shared_bytes() const {
    return static_cast<std::size_t>(kCeilingWarps) * stages * (record_bytes + sizeof(std::uint64_t));
  }
};

// Record of turn `i`: an odd factor permutes the numbers below a power of two.
SKVQ_FN std::int64_t record_of_turn(std::int64_t i, std::int64_t records, bool scattered) {
  return scattered ? (i * 0x9e3779b1ll) & (records - 1) : i;
}

[[maybe_unused]] static __global__ void stream_bulk(const unsigned char* from, std::int64_t records,
                                                    CeilingShape shape) {
#if SKVQ_HAS_BULK_COPY
  SKVQ_DYNAMIC_SHARED(shared);
  const int warp = cuda::warp_index(), bytes = shape.record_bytes;
  unsigned char* ring = shared + warp * shape.stages * bytes;
  auto* barriers =
      reinterpret_cast<std::uint64_t*>(shared + kCeilingWarps * shape.stages * bytes) + warp * shape.stages;
  const bool leader = cuda::lane_index() == 0;
  if (leader) {
    for (int i = 0; i < shape.stages; ++i) cuda::ptx::barrier_init(barriers + i, 1);
    cuda::ptx::barrier_init_fence();
  }
  __syncwarp();
  const std::int64_t step = std::int64_t{gridDim.x} * kCeilingWarps,
                     first = std::int64_t{blockIdx.x} * kCeilingWarps + warp;
  const auto copy = [&](std::int64_t turn, int stage) {
    if (!leader || turn >= records) return;
    cuda::ptx::barrier_arrive_expect(barriers + stage, bytes);
    cuda::ptx::copy_bulk(ring + stage * bytes, from + record_of_turn(turn, records, shape.scattered) * bytes, bytes,
                         barriers + stage);
  };
  for (int stage = 0; stage < shape.stages; ++stage) copy(first + stage * step, stage);
  int stage = 0;
  std::uint32_t parity = 0;
  for (std::int64_t turn = first; turn < records; turn += step) {
    cuda::ptx::barrier_wait(barriers + stage, parity);
    __syncwarp();
    copy(turn + shape.stages * step, stage);
    if (++stage == shape.stages) stage = 0, parity ^= 1;
  }
#endif
}

template <int Stages>
__global__ void stream_sixteens(const unsigned char* from, std::int64_t records, CeilingShape shape) {
  SKVQ_DYNAMIC_SHARED(shared);
  const int warp = cuda::warp_index(), lane = cuda::lane_index(), bytes = shape.record_bytes;
  unsigned char* ring = shared + warp * Stages * bytes;
  const std::int64_t step = std::int64_t{gridDim.x} * kCeilingWarps,
                     first = std::int64_t{blockIdx.x} * kCeilingWarps + warp;
  const auto copy = [&](std::int64_t turn, int stage) {
    const unsigned char* record = from + record_of_turn(turn, records, shape.scattered) * bytes;
    for (int at = lane * 16; turn < records && at < bytes; at += 512) {
      cuda::ptx::copy_async_16(ring + stage * bytes + at, record + at);
    }
    cuda::ptx::commit_copies();
  };
  for (int stage = 0; stage < Stages; ++stage) copy(first + stage * step, stage);
  int stage = 0;
  for (std::int64_t turn = first; turn < records; turn += step) {
    cuda::ptx::wait_copies<Stages - 1>();
    __syncwarp();
    copy(turn + Stages * step, stage);
    if (++stage == Stages) stage = 0;
  }
  cuda::ptx::wait_copies<0>();
}

inline double ceiling_rate(const Device& device, const PassTimer& timer, cudaStream_t stream, const DeviceBytes& memory,
                           const CeilingShape& shape, int repetitions) {
  const std::int64_t records = std::int64_t{1} << (63 - __builtin_clzll(memory.size() / shape.record_bytes));
  const auto kernel = shape.bulk ? stream_bulk : shape.stages == 2 ? stream_sixteens<2> : stream_sixteens<3>;
  const GpuTiming time = timer.time(
      {2, repetitions, 1}, [] {},
      [&](int) {
        cuda::launch("stream", kernel, {std::int64_t{device.multiprocessors} * shape.warps / kCeilingWarps},
                     kCeilingWarps * cuda::kWarp, shape.shared_bytes(), stream, memory.as<const unsigned char>(),
                     records, shape);
      });
  return static_cast<double>(records) * shape.record_bytes / time.device.min_s;
}

// The best of each way to copy becomes a figure of its own, in GB/s and in percent of copying in the same run.
inline void measure_ceilings(Findings& findings, const Device& device, cudaStream_t stream, const Bandwidth& bandwidth,
                             int repetitions) {
  const PassTimer timer(stream, device.peak_clock_hz);
  const DeviceBytes memory(std::min<std::size_t>(std::size_t{1} << 30, free_bytes() / 2));
  fill_random(memory, stream);
  double best_bulk = 0.0, best_sixteens = 0.0;
  for (const bool bulk : {true, false}) {
    if (bulk && device.major < 9) continue;
    double& best = bulk ? best_bulk : best_sixteens;
    for (const int record_bytes : bulk ? std::vector{4096, 3968, 4352} : std::vector{4096}) {
      for (const int stages : {2, 3}) {
        for (const int warps : {12, 16}) {
          for (const bool scattered : {false, true}) {
            const CeilingShape shape{record_bytes, stages, warps, bulk, scattered};
            const double rate = ceiling_rate(device, timer, stream, memory, shape, repetitions);
            best = std::max(best, rate);
            findings.add(shape.name(), true, concat(rate / 1e9, " GB/s, ", 100 * rate / bandwidth.copy(), " % of copy"),
                         Json().add("gb_per_s", rate / 1e9).add("percent_of_copy", 100 * rate / bandwidth.copy()));
          }
        }
      }
    }
  }
  for (const auto& [name, rate] :
       {std::pair{"ceiling, bulk copies", best_bulk}, {"ceiling, 16-byte copies", best_sixteens}}) {
    if (rate == 0.0) continue;
    findings.add(name, true, concat(rate / 1e9, " GB/s"),
                 Json().add("gb_per_s", rate / 1e9).add("percent_of_copy", 100 * rate / bandwidth.copy()));
  }
}

}  // namespace skvq::bench

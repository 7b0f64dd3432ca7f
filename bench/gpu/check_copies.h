// Asynchronous copies of csrc/cuda/ptx.cuh: what arrives, and that nothing beside it is touched.
#pragma once

#include <vector>

#include "gpu/check_numbers.h"
#include "gpu/random.h"

namespace skvq::bench {

inline constexpr int kCopyRoom = 16384;  // bytes of shared memory that are looked at

// Each lane copies 16 bytes, `lane % 17` of them from memory, with a gap of 16 bytes behind; three groups one after the
// other. `out` is the shared memory afterwards.
[[maybe_unused]] static __global__ void copy_sixteens(const unsigned char* from, unsigned char* out) {
  SKVQ_DYNAMIC_SHARED(shared);
  const int lane = cuda::lane_index();
  for (int i = lane; i < kCopyRoom; i += cuda::kWarp) shared[i] = 0xa5;
  __syncwarp();
  for (int group = 0; group < 3; ++group) {
    const int at = (group * cuda::kWarp + lane) * 32;
    cuda::ptx::copy_async_16(shared + at, from + at, lane % 17);
    cuda::ptx::commit_copies();
  }
  cuda::ptx::wait_copies<1>();
  cuda::ptx::wait_copies<0>();
  __syncwarp();
  for (int i = lane; i < kCopyRoom; i += cuda::kWarp) out[i] = shared[i];
}

inline void check_sixteens(Findings& findings) {
  std::vector<std::uint8_t> in(kCopyRoom);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<std::uint8_t>(mix(i));
  const DeviceBytes from(in), to(kCopyRoom);
  to.fill(0xff);
  cuda::launch("copy_sixteens", copy_sixteens, {1}, cuda::kWarp, kCopyRoom, nullptr, from.as<const unsigned char>(),
               to.as<unsigned char>());
  const auto out = to.download<std::uint8_t>();
  Tally tally;
  for (int i = 0; i < kCopyRoom; ++i) {
    const int piece = i / 32, in_piece = i % 32, read = piece % cuda::kWarp % 17;
    const bool copied = piece < 3 * cuda::kWarp && in_piece < 16;
    const int want = !copied ? 0xa5 : in_piece < read ? in[i] : 0;
    tally.check(out[i] == want, "byte ", i, " is ", int{out[i]}, ", not ", want);
  }
  findings.add("cp.async, 0 to 16 bytes", tally.ok(), tally.text(), tally.figures());
}

// One warp, two barriers, a copy for each phase: sizes[i] bytes from `from`, to 128 bytes into the room.
[[maybe_unused]] static __global__ void copy_in_bulk(const unsigned char* from, const int* sizes, int count,
                                                     unsigned char* out) {
#if SKVQ_HAS_BULK_COPY
  SKVQ_DYNAMIC_SHARED(shared);
  unsigned char* room = shared + 128;
  auto* barriers = reinterpret_cast<std::uint64_t*>(shared);
  const int lane = cuda::lane_index();
  if (lane == 0) {
    for (int i = 0; i < 2; ++i) cuda::ptx::barrier_init(barriers + i, 1);
    cuda::ptx::barrier_init_fence();
  }
  for (int i = 0; i < count; ++i) {
    for (int at = lane; at < kCopyRoom; at += cuda::kWarp) room[at] = 0xa5;
    cuda::ptx::proxy_fence();
    __syncwarp();
    if (lane == 0) {
      cuda::ptx::barrier_arrive_expect(barriers + i % 2, static_cast<std::uint32_t>(sizes[i]));
      cuda::ptx::copy_bulk(room + 128, from, static_cast<std::uint32_t>(sizes[i]), barriers + i % 2);
    }
    cuda::ptx::barrier_wait(barriers + i % 2, static_cast<std::uint32_t>(i / 2 % 2));
    for (int at = lane; at < kCopyRoom; at += cuda::kWarp) out[i * kCopyRoom + at] = room[at];
    __syncwarp();
  }
#endif
}

inline void check_bulk(Findings& findings) {
  const std::vector<int> sizes = {16, 32, 48, 1024, 3968, 4096, 4352, 8192};
  std::vector<std::uint8_t> in(kCopyRoom);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<std::uint8_t>(mix(i + 7));
  const DeviceBytes from(in), lengths(sizes), to(sizes.size() * kCopyRoom);
  to.fill(0xff);
  cuda::launch("copy_in_bulk", copy_in_bulk, {1}, cuda::kWarp, 128 + kCopyRoom, nullptr, from.as<const unsigned char>(),
               lengths.as<const int>(), static_cast<int>(sizes.size()), to.as<unsigned char>());
  const auto out = to.download<std::uint8_t>();
  Tally tally;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const int copy = static_cast<int>(i) / kCopyRoom, at = static_cast<int>(i) % kCopyRoom;
    const int want = at >= 128 && at < 128 + sizes[copy] ? in[at - 128] : 0xa5;
    tally.check(out[i] == want, "copy of ", sizes[copy], " bytes: byte ", at, " is ", int{out[i]}, ", not ", want);
  }
  findings.add("cp.async.bulk and mbarrier", tally.ok(), tally.text(), tally.figures());
}

// `bulk`: whether the device has bulk copies (compute capability 9.0).
inline void check_copies(Findings& findings, bool bulk) {
  check_sixteens(findings);
  if (bulk) {
    check_bulk(findings);
  } else {
    findings.skip("cp.async.bulk and mbarrier", "an instruction from compute capability 9.0 on");
  }
}

}  // namespace skvq::bench

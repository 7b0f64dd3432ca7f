// A warp's ring of stages in shared memory, filled by asynchronous copies while the warp computes. Nobody else touches
// it, so there is no barrier of the block in the loop.
//
// Two ways to copy behind one interface: 16 bytes per lane (cp.async, sm_80), or a whole record by one lane and the
// copy engine (cp.async.bulk with an mbarrier for each stage, sm_90). Use: load<0> to load<Stages - 2>, then in turn
// next() and load<Stages - 2>, which refills the stage that was read before; `there` is false after the last record.
#pragma once

#include "cuda/ptx.cuh"

// 1: bulk copies where the hardware has them. 0: cp.async everywhere.
#if !defined(SKVQ_BULK_COPIES)
#define SKVQ_BULK_COPIES 1
#endif

namespace skvq::cuda {

template <int Stages>
struct RingStages {
  unsigned char* memory;
  int stage_bytes;
  int reading = 0;  // stage of the next record

  template <int Ahead>
  SKVQ_DEVICE int stage() const {
    const int i = reading + Ahead;
    return i >= Stages ? i - Stages : i;
  }
  SKVQ_DEVICE unsigned char* at(int stage) const { return memory + stage * stage_bytes; }
};

template <int Stages>
struct AsyncRing : RingStages<Stages> {
  SKVQ_DEVICE AsyncRing(unsigned char* memory, int bytes, std::uint64_t*) : RingStages<Stages>{memory, bytes} {}

  // MaxBytes bounds `bytes` at compile time.
  template <int Ahead, int MaxBytes>
  SKVQ_DEVICE void load(bool there, const unsigned char* from, int bytes) {
    if (there) {
      const int lane = lane_index() * 16;
      unsigned char* to = this->at(this->template stage<Ahead>()) + lane;
#pragma unroll
      for (int at = 0; at < MaxBytes; at += kWarp * 16) {
        if (at + lane < bytes) ptx::copy_async_16(to + at, from + lane + at);
      }
    }
    ptx::commit_copies();
  }
  // The oldest record, once it is there.
  SKVQ_DEVICE unsigned char* next() {
    ptx::wait_copies<Stages - 2>();
    __syncwarp();  // also: every lane is done with the record before
    unsigned char* stage = this->at(this->reading);
    this->reading = this->template stage<1>();
    return stage;
  }
  // The warp wrote to the memory by ordinary means, and has synchronized since.
  SKVQ_DEVICE void written() {}
  // After the last record: the memory may be used for something else.
  SKVQ_DEVICE void drain() {
    ptx::wait_copies<0>();
    __syncwarp();
  }
};

#if SKVQ_HAS_BULK_COPY
template <int Stages>
struct BulkRing : RingStages<Stages> {
  std::uint64_t* arrived;    // a barrier for each stage
  std::uint32_t parity = 0;  // of the phase that the stages from `reading` on are in

  SKVQ_DEVICE BulkRing(unsigned char* memory, int bytes, std::uint64_t* barriers)
      : RingStages<Stages>{memory, bytes}, arrived(barriers) {
    if (lane_index() == 0) {
      for (int i = 0; i < Stages; ++i) ptx::barrier_init(arrived + i, 1);
      ptx::barrier_init_fence();
    }
    __syncwarp();  // what follows synchronizes too
  }

  template <int Ahead, int MaxBytes>
  SKVQ_DEVICE void load(bool there, const unsigned char* from, int bytes) {
    if (!there || lane_index() != 0) return;
    const int stage = this->template stage<Ahead>();
    ptx::barrier_arrive_expect(arrived + stage, static_cast<std::uint32_t>(bytes));
    ptx::copy_bulk(this->at(stage), from, static_cast<std::uint32_t>(bytes), arrived + stage);
  }
  SKVQ_DEVICE unsigned char* next() {
    ptx::barrier_wait(arrived + this->reading, parity);
    __syncwarp();
    unsigned char* stage = this->at(this->reading);
    this->reading = this->template stage<1>();
    parity ^= this->reading == 0 ? 1u : 0u;
    return stage;
  }
  SKVQ_DEVICE void written() { ptx::proxy_fence(); }
  SKVQ_DEVICE void drain() { __syncwarp(); }
};
#endif

#if SKVQ_HAS_BULK_COPY && SKVQ_BULK_COPIES
template <int Stages>
using Ring = BulkRing<Stages>;
#else
template <int Stages>
using Ring = AsyncRing<Stages>;
#endif

}  // namespace skvq::cuda

// mbarrier and cp.async.bulk.
#include "simt/broken/cases.h"

namespace simt::broken {
namespace {

namespace ptx = skvq::cuda::ptx;

constexpr int kTiles = 5, kStages = 2, kTileWords = 32;

struct Ring {
  alignas(128) int stages[kStages][kTileWords];
  std::uint64_t arrived[kStages];
};

SKVQ_DEVICE void init(Ring& ring) {
  if (threadIdx.x == 0) {
    for (std::uint64_t& barrier : ring.arrived) ptx::barrier_init(&barrier, 1);
    ptx::barrier_init_fence();
  }
  __syncthreads();
}
SKVQ_DEVICE const int* tile(const int* in, int index) {
  return in + (blockIdx.x * kTiles + static_cast<unsigned>(index)) * kTileWords;
}
SKVQ_DEVICE void load(Ring& ring, const int* in, int index, int bytes = kTileWords * 4) {
  if (threadIdx.x != 0) return;
  std::uint64_t* barrier = &ring.arrived[index % kStages];
  ptx::barrier_arrive_expect(barrier, kTileWords * 4);
  ptx::copy_bulk(ring.stages[index % kStages], tile(in, index), static_cast<std::uint32_t>(bytes), barrier);
}
int tile_word(int block, int index, int thread) {
  return input((block * kTiles + index) * kTileWords + thread % kTileWords);
}
int first_tile(int block, int thread) {
  return tile_word(block, 0, thread);
}

template <bool bad>
__global__ void bulk_missing_wait(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  init(ring);
  load(ring, in, 0);
  __syncthreads();
  if (!bad) ptx::barrier_wait(&ring.arrived[0], 0);
  out[out_index()] = ring.stages[0][threadIdx.x % kTileWords];
  ptx::barrier_wait(&ring.arrived[0], 0);
}

// Parity 1 is that of the phase before the first: there is nothing to wait for.
template <bool bad>
__global__ void bulk_wrong_parity(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  init(ring);
  load(ring, in, 0);
  ptx::barrier_wait(&ring.arrived[0], bad ? 1 : 0);
  out[out_index()] = ring.stages[0][threadIdx.x % kTileWords];
  ptx::barrier_wait(&ring.arrived[0], 0);
}

// Waits for a second phase that never begins.
template <bool bad>
__global__ void bulk_parity_of_the_next_phase(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  init(ring);
  load(ring, in, 0);
  ptx::barrier_wait(&ring.arrived[0], 0);
  if (bad) ptx::barrier_wait(&ring.arrived[0], 1);
  out[out_index()] = ring.stages[0][threadIdx.x % kTileWords];
}

template <bool bad>
__global__ void bulk_too_few_bytes(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  init(ring);
  load(ring, in, 0, bad ? 64 : kTileWords * 4);
  ptx::barrier_wait(&ring.arrived[0], 0);
  out[out_index()] = ring.stages[0][threadIdx.x % kTileWords];
}

// All tiles through two stages. Thread 0 refills a stage; without a barrier others may still read it.
template <bool bad>
__global__ void bulk_refill_too_early(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  init(ring);
  load(ring, in, 0);
  int sum = 0;
  for (int i = 0; i < kTiles; ++i) {
    if (i + 1 < kTiles) load(ring, in, i + 1);
    ptx::barrier_wait(&ring.arrived[i % kStages], static_cast<std::uint32_t>(i / kStages % 2));
    sum += ring.stages[i % kStages][threadIdx.x % kTileWords];
    if (!bad) __syncthreads();
  }
  out[out_index()] = sum;
}
int sum_of_tiles(int block, int thread) {
  int sum = 0;
  for (int i = 0; i < kTiles; ++i) sum += tile_word(block, i, thread);
  return sum;
}

// A second copy into a stage whose first has not arrived.
template <bool bad>
__global__ void bulk_copies_overlap(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  init(ring);
  load(ring, in, 0);
  if (!bad) ptx::barrier_wait(&ring.arrived[0], 0);
  __syncthreads();
  load(ring, in, kStages);
  ptx::barrier_wait(&ring.arrived[0], 1);
  out[out_index()] = ring.stages[0][threadIdx.x % kTileWords];
}

template <bool bad>
__global__ void bulk_never_waited_for(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  init(ring);
  load(ring, in, 0);
  if (!bad) ptx::barrier_wait(&ring.arrived[0], 0);
  out[out_index()] = static_cast<int>(threadIdx.x);
}

template <bool bad>
__global__ void bulk_misaligned(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  init(ring);
  if (threadIdx.x == 0) {
    ptx::barrier_arrive_expect(&ring.arrived[0], 64);
    ptx::copy_bulk(ring.stages[0] + (bad ? 2 : 0), tile(in, 0), 64, &ring.arrived[0]);
  }
  ptx::barrier_wait(&ring.arrived[0], 0);
  out[out_index()] = static_cast<int>(threadIdx.x);
}

template <bool bad>
__global__ void bulk_odd_size(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  init(ring);
  if (threadIdx.x == 0) {
    ptx::barrier_arrive_expect(&ring.arrived[0], bad ? 72 : 64);
    ptx::copy_bulk(ring.stages[0], tile(in, 0), bad ? 72 : 64, &ring.arrived[0]);
  }
  ptx::barrier_wait(&ring.arrived[0], 0);
  out[out_index()] = static_cast<int>(threadIdx.x);
}

template <bool bad>
__global__ void bulk_past_shared(int* out, const int* in) {
  SKVQ_DYNAMIC_SHARED(dynamic);
  SKVQ_SHARED(Ring, ring);
  init(ring);
  if (threadIdx.x == 0) {
    ptx::barrier_arrive_expect(&ring.arrived[0], 64);
    ptx::copy_bulk(dynamic + kDynamicBytes - (bad ? 48 : 64), tile(in, 0), 64, &ring.arrived[0]);
  }
  ptx::barrier_wait(&ring.arrived[0], 0);
  out[out_index()] = static_cast<int>(threadIdx.x);
}

// Others may come to the barrier before it is one.
template <bool bad>
__global__ void barrier_init_unseen(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  if (threadIdx.x == 0) ptx::barrier_init(&ring.arrived[0], 1);
  if (!bad) __syncthreads();
  load(ring, in, 0);
  ptx::barrier_wait(&ring.arrived[0], 0);
  out[out_index()] = ring.stages[0][threadIdx.x % kTileWords];
}

template <bool bad>
__global__ void barrier_written_over(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  init(ring);
  if (bad && threadIdx.x == 0) ring.arrived[0] = 0;
  load(ring, in, 0);
  ptx::barrier_wait(&ring.arrived[0], 0);
  out[out_index()] = ring.stages[0][threadIdx.x % kTileWords];
}

template <bool bad>
__global__ void too_many_arrivals(int* out, const int*) {
  SKVQ_SHARED(Ring, ring);
  if (threadIdx.x == 0) ptx::barrier_init(&ring.arrived[0], 2);
  __syncthreads();
  if (threadIdx.x < (bad ? 3 : 2)) ptx::barrier_arrive_expect(&ring.arrived[0], threadIdx.x == 0 ? 16 : 0);
  out[out_index()] = static_cast<int>(threadIdx.x);
}

int thread_of(int, int thread) {
  return thread;
}

}  // namespace

Cases bulk_copies() {
  return {SIMT_CASE(bulk_missing_wait, first_tile),
          SIMT_CASE(bulk_wrong_parity, first_tile),
          SIMT_CASE(bulk_parity_of_the_next_phase, first_tile),
          SIMT_CASE(bulk_too_few_bytes, first_tile),
          SIMT_CASE(bulk_refill_too_early, sum_of_tiles),
          SIMT_CASE(bulk_copies_overlap, [](int block, int thread) { return tile_word(block, kStages, thread); }),
          SIMT_CASE(bulk_never_waited_for, thread_of),
          SIMT_CASE(bulk_misaligned, thread_of),
          SIMT_CASE(bulk_odd_size, thread_of),
          SIMT_CASE(bulk_past_shared, thread_of),
          SIMT_CASE(barrier_init_unseen, first_tile),
          SIMT_CASE(barrier_written_over, first_tile),
          SIMT_CASE(too_many_arrivals, thread_of)};
}

}  // namespace simt::broken

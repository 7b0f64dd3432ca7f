// Barriers of a block, and blocks among each other.
#include "simt/broken/cases.h"

namespace simt::broken {
namespace {

int thread_of(int, int thread) {
  return thread;
}

template <bool bad>
__global__ void divergent_barrier(int* out, const int*) {
  if (bad && threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[out_index()] = static_cast<int>(threadIdx.x);
}

template <bool bad>
__global__ void skipped_barrier(int* out, const int*) {
  if (!bad || threadIdx.x / 32 != 2) __syncthreads();
  out[out_index()] = static_cast<int>(threadIdx.x);
}

template <bool bad>
__global__ void early_return(int* out, const int*) {
  if (bad && threadIdx.x >= 40) return;
  __syncthreads();
  out[out_index()] = static_cast<int>(threadIdx.x);
}

struct Scratch {
  int words[kThreads];
};

template <bool bad>
__global__ void missing_barrier(int* out, const int*) {
  SKVQ_SHARED(Scratch, shared);
  shared.words[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!bad) __syncthreads();
  out[out_index()] = shared.words[kThreads - 1 - threadIdx.x];
}

// Sums over the block, twice through the same scratch; without a barrier the second one may overwrite the first.
template <bool bad>
__global__ void scratch_reused(int* out, const int*) {
  SKVQ_SHARED(Scratch, shared);
  int result = 0;
  for (int round = 0; round < 2; ++round) {
    const int sum = __reduce_add_sync(0xffffffffu, static_cast<int>(threadIdx.x) + round);
    if (threadIdx.x % 32 == 0) shared.words[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int w = 0; w < kThreads / 32; ++w) result += shared.words[w];
    if (!bad) __syncthreads();
  }
  out[out_index()] = result;
}

// Thread 5 waits for what thread 0 does after a barrier to which thread 5 does not come.
template <bool bad>
__global__ void deadlock(int* out, const int*) {
  SKVQ_SHARED(std::uint64_t, barrier);
  if (threadIdx.x == 0) skvq::cuda::ptx::barrier_init(&barrier, 1);
  __syncthreads();
  if (bad && threadIdx.x == 5) skvq::cuda::ptx::barrier_wait(&barrier, 0);
  __syncthreads();
  if (threadIdx.x == 0) skvq::cuda::ptx::barrier_arrive_expect(&barrier, 0);
  if (threadIdx.x == 5) skvq::cuda::ptx::barrier_wait(&barrier, 0);
  out[out_index()] = static_cast<int>(threadIdx.x);
}

template <bool bad>
__global__ void blocks_write_one_word(int* out, const int*) {
  __syncthreads();
  out[bad ? static_cast<int>(threadIdx.x) : out_index()] = static_cast<int>(threadIdx.x);
}

template <bool bad>
__global__ void sum_without_atomic(int* out, const int*) {
  SKVQ_SHARED(Scratch, shared);
  if (threadIdx.x == 0) shared.words[0] = 0;
  __syncthreads();
  if (bad) {
    shared.words[0] += 1;
  } else {
    atomicAdd(&shared.words[0], 1);
  }
  __syncthreads();
  out[out_index()] = shared.words[0];
}

// Each block leaves a part; the last one to come adds them up. Between its part and the count, and between the count
// and the parts, there must be a fence.
template <bool bad>
__global__ void missing_threadfence(int* out, const int*) {
  SKVQ_SHARED(Scratch, shared);
  const unsigned blocks = gridDim.x;
  int* count = out + blocks * kThreads;  // room that main.cpp sets to 0
  int* parts = count + 1;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    if (!bad) __threadfence();
    shared.words[0] = atomicAdd(count, 1) == static_cast<int>(blocks) - 1;
    __threadfence();
  }
  __syncthreads();
  out[out_index()] = 6;
  if (shared.words[0] != 0 && threadIdx.x == 1) {
    int sum = 0;
    for (unsigned b = 0; b < blocks; ++b) sum += parts[b];
    out[out_index()] = sum;
  }
}

}  // namespace

Cases barriers() {
  return {SIMT_CASE(divergent_barrier, thread_of),
          SIMT_CASE(skipped_barrier, thread_of),
          SIMT_CASE(early_return, thread_of),
          SIMT_CASE(missing_barrier, [](int, int thread) { return kThreads - 1 - thread; }),
          SIMT_CASE(scratch_reused, [](int, int) { return kThreads * (kThreads - 1) + kThreads; }),
          SIMT_CASE(deadlock, thread_of),
          SIMT_CASE(blocks_write_one_word, thread_of),
          SIMT_CASE(sum_without_atomic, [](int, int) { return kThreads; }),
          SIMT_CASE(missing_threadfence, [](int, int) { return 6; })};
}

}  // namespace simt::broken

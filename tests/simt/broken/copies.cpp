// cp.async.
#include "simt/broken/cases.h"

namespace simt::broken {
namespace {

namespace ptx = skvq::cuda::ptx;

struct Stage {
  uint4 words[kThreads];
};
struct Ring {
  Stage stages[2];
};

SKVQ_DEVICE const int* my_input(const int* in) {
  return in + out_index() * 4;
}
int my_first(int block, int thread) {
  return input((block * kThreads + thread) * 4);
}
int next_first(int block, int thread) {
  return input((block * kThreads + (thread + 1) % kThreads) * 4);
}

template <bool bad>
__global__ void missing_wait(int* out, const int* in) {
  SKVQ_SHARED(Stage, stage);
  ptx::copy_async_16(&stage.words[threadIdx.x], my_input(in));
  ptx::commit_copies();
  if (!bad) ptx::wait_copies<0>();
  out[out_index()] = static_cast<int>(stage.words[threadIdx.x].x);
  ptx::wait_copies<0>();
}

// A wait that leaves one group too many under way.
template <bool bad>
__global__ void wait_for_too_few(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  ptx::copy_async_16(&ring.stages[0].words[threadIdx.x], my_input(in));
  ptx::commit_copies();
  ptx::copy_async_16(&ring.stages[1].words[threadIdx.x], my_input(in));
  ptx::commit_copies();
  constexpr int kPending = bad ? 1 : 0;
  ptx::wait_copies<kPending>();
  out[out_index()] = static_cast<int>(ring.stages[1].words[threadIdx.x].x);
  ptx::wait_copies<0>();
}

template <bool bad>
__global__ void missing_barrier_after_wait(int* out, const int* in) {
  SKVQ_SHARED(Stage, stage);
  ptx::copy_async_16(&stage.words[threadIdx.x], my_input(in));
  ptx::commit_copies();
  ptx::wait_copies<0>();
  if (!bad) __syncthreads();
  out[out_index()] = static_cast<int>(stage.words[(threadIdx.x + 1) % kThreads].x);
}

// Three tiles through two stages: the third lands where the first may still be read.
template <bool bad>
__global__ void refill_too_early(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  const int* block_input = in + blockIdx.x * kThreads * 4;
  const auto load = [&](int tile) {
    const int word = static_cast<int>(threadIdx.x + static_cast<unsigned>(tile)) % kThreads;
    ptx::copy_async_16(&ring.stages[tile % 2].words[threadIdx.x], block_input + word * 4);
    ptx::commit_copies();
  };
  load(0);
  unsigned sum = 0;
  for (int tile = 0; tile < 3; ++tile) {
    ptx::wait_copies<0>();
    if (!bad || tile == 0) __syncthreads();
    if (tile + 1 < 3) load(tile + 1);
    sum += ring.stages[tile % 2].words[(threadIdx.x + 64) % kThreads].x;
  }
  ptx::wait_copies<0>();
  out[out_index()] = static_cast<int>(sum);
}
int sum_of_tiles(int block, int thread) {
  int sum = 0;
  for (int tile = 0; tile < 3; ++tile) sum += input((block * kThreads + (thread + 64 + tile) % kThreads) * 4);
  return sum;
}

template <bool bad>
__global__ void copies_never_waited_for(int* out, const int* in) {
  SKVQ_SHARED(Stage, stage);
  ptx::copy_async_16(&stage.words[threadIdx.x], my_input(in));
  ptx::commit_copies();
  if (!bad) ptx::wait_copies<0>();
  out[out_index()] = static_cast<int>(threadIdx.x);
}

template <bool bad>
__global__ void copies_overlap(int* out, const int* in) {
  SKVQ_SHARED(Stage, stage);
  ptx::copy_async_16(&stage.words[threadIdx.x], my_input(in));
  if (!bad) {
    ptx::commit_copies();
    ptx::wait_copies<0>();
  }
  ptx::copy_async_16(&stage.words[threadIdx.x], my_input(in));
  ptx::commit_copies();
  ptx::wait_copies<0>();
  out[out_index()] = static_cast<int>(stage.words[threadIdx.x].x);
}

template <bool bad>
__global__ void misaligned_destination(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  ptx::copy_async_16(reinterpret_cast<char*>(&ring.stages[0].words[threadIdx.x]) + (bad ? 8 : 0), my_input(in));
  ptx::commit_copies();
  ptx::wait_copies<0>();
  out[out_index()] = static_cast<int>(ring.stages[0].words[threadIdx.x].x);
}

template <bool bad>
__global__ void misaligned_source(int* out, const int* in) {
  SKVQ_SHARED(Stage, stage);
  const bool wrong = bad && threadIdx.x == 17;
  ptx::copy_async_16(&stage.words[threadIdx.x], my_input(in) - (wrong ? 1 : 0));
  ptx::commit_copies();
  ptx::wait_copies<0>();
  out[out_index()] = static_cast<int>(stage.words[threadIdx.x].x);
}

template <bool bad>
__global__ void copy_past_shared(int* out, const int* in) {
  SKVQ_SHARED(Stage, stage);
  uint4* to = stage.words + threadIdx.x + (bad ? 1 : 0);
  ptx::copy_async_16(to, my_input(in));
  ptx::commit_copies();
  ptx::wait_copies<0>();
  out[out_index()] = static_cast<int>(to->x);
}

template <bool bad>
__global__ void copy_to_global(int* out, const int* in) {
  SKVQ_SHARED(Stage, stage);
  void* to = bad ? static_cast<void*>(out) : &stage.words[threadIdx.x];
  ptx::copy_async_16(to, my_input(in));
  ptx::commit_copies();
  ptx::wait_copies<0>();
  out[out_index()] = my_input(in)[0];
}

template <bool bad>
__global__ void copy_from_past_the_end(int* out, const int* in) {
  SKVQ_SHARED(Stage, stage);
  const int last = kBlocks * kThreads - 1;
  const int* from = bad && out_index() == last ? in + kWords : my_input(in);
  ptx::copy_async_16(&stage.words[threadIdx.x], from);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  out[out_index()] = my_input(in)[0];
}

}  // namespace

Cases copies() {
  return {SIMT_CASE(missing_wait, my_first),
          SIMT_CASE(wait_for_too_few, my_first),
          SIMT_CASE(missing_barrier_after_wait, next_first),
          SIMT_CASE(refill_too_early, sum_of_tiles),
          SIMT_CASE(copies_never_waited_for, [](int, int thread) { return thread; }),
          SIMT_CASE(copies_overlap, my_first),
          SIMT_CASE(misaligned_destination, my_first),
          SIMT_CASE(misaligned_source, my_first),
          SIMT_CASE(copy_past_shared, my_first),
          SIMT_CASE(copy_to_global, my_first),
          SIMT_CASE(copy_from_past_the_end, my_first)};
}

}  // namespace simt::broken

// Addresses and values that a single thread gets wrong.
#include "simt/broken/cases.h"

namespace simt::broken {
namespace {

template <bool bad>
__global__ void global_read_past_the_end(int* out, const int* in) {
  const bool last = out_index() == kBlocks * kThreads - 1;
  out[out_index()] = in[bad && last ? kWords : out_index()];
}

template <bool bad>
__global__ void global_write_before_the_start(int* out, const int*) {
  if (bad && out_index() == 0) out[-1] = 5;
  out[out_index()] = 0;
}

struct Words {
  int words[kThreads];
};
struct TwoArrays {
  int first[kThreads], second[kThreads];
};

// Through a pointer, as most code does it, where the type's bounds are out of sight.
template <bool bad>
__global__ void shared_read_past_the_end(int* out, const int*) {
  SKVQ_SHARED(Words, shared);
  int* words = shared.words;
  words[threadIdx.x] = 0;
  __syncthreads();
  out[out_index()] = words[threadIdx.x + (bad && threadIdx.x == kThreads - 1 ? 1 : 0)];
}

template <bool bad>
__global__ void dynamic_shared_write_past_the_end(int* out, const int*) {
  SKVQ_DYNAMIC_SHARED(dynamic);
  dynamic[threadIdx.x + (bad ? kDynamicBytes - kThreads + 1 : 0)] = 1;
  out[out_index()] = 0;
}

template <bool bad>
__global__ void one_array_into_the_next(int* out, const int*) {
  SKVQ_SHARED(TwoArrays, shared);
  shared.first[threadIdx.x] = shared.second[threadIdx.x] = 0;
  __syncthreads();
  out[out_index()] = shared.first[threadIdx.x + (bad && threadIdx.x == kThreads - 1 ? 1 : 0)];
}

template <bool bad>
__global__ void shift_by_32(int* out, const int*) {
  const unsigned shift = bad ? threadIdx.x / 32 * 16 : threadIdx.x / 64 * 16;
  out[out_index()] = static_cast<int>(1u << shift);
}

template <bool bad>
__global__ void misaligned_vector(int* out, const int* in) {
  const int* p = in + threadIdx.x / 4 * 4 + (bad && threadIdx.x == 9 ? 1 : 0);
  out[out_index()] = reinterpret_cast<const int4*>(p)->x;
}

template <bool bad>
__global__ void shared_read_before_written(int* out, const int*) {
  SKVQ_SHARED(Words, shared);
  if (!bad || threadIdx.x != 77) shared.words[threadIdx.x] = 0;
  __syncthreads();
  out[out_index()] = shared.words[kThreads - 1 - threadIdx.x];
}

// A block does not find what the one before it left.
template <bool bad>
__global__ void dynamic_shared_read_before_written(int* out, const int*) {
  SKVQ_DYNAMIC_SHARED(dynamic);
  if (!bad || blockIdx.x == 0) dynamic[threadIdx.x] = 0;
  __syncthreads();
  out[out_index()] = dynamic[threadIdx.x];
}

int zero(int, int) {
  return 0;
}
int same_word(int block, int thread) {
  return input(block * kThreads + thread);
}

}  // namespace

Cases memory() {
  return {SIMT_CASE(global_read_past_the_end, same_word),
          SIMT_CASE(global_write_before_the_start, zero),
          SIMT_CASE(shared_read_past_the_end, zero),
          SIMT_CASE(dynamic_shared_write_past_the_end, zero),
          SIMT_CASE(one_array_into_the_next, zero),
          SIMT_CASE(shift_by_32, [](int, int thread) { return thread < 64 ? 1 : 1 << 16; }),
          SIMT_CASE(misaligned_vector, [](int, int thread) { return input(thread / 4 * 4); }),
          SIMT_CASE(shared_read_before_written, zero),
          SIMT_CASE(dynamic_shared_read_before_written, zero)};
}

}  // namespace simt::broken

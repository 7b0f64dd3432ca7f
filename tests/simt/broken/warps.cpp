// Collectives of a warp.
#include "simt/broken/cases.h"

namespace simt::broken {
namespace {

constexpr unsigned kAll = 0xffffffffu;

template <bool bad>
__global__ void mask_without_caller(int* out, const int*) {
  const unsigned mask = bad && threadIdx.x % 32 == 3 ? kAll & ~8u : kAll;
  out[out_index()] = __shfl_xor_sync(mask, static_cast<int>(threadIdx.x), 1);
}

template <bool bad>
__global__ void masks_differ(int* out, const int*) {
  const unsigned even = 0x55555555u;
  out[out_index()] = __shfl_xor_sync(bad && threadIdx.x % 2 == 0 ? even : kAll, static_cast<int>(threadIdx.x), 2);
}

// A full mask, but half of the lanes never come.
template <bool bad>
__global__ void shuffle_under_condition(int* out, const int*) {
  int value = static_cast<int>(threadIdx.x);
  if (!bad || threadIdx.x % 32 < 16) value = __shfl_xor_sync(kAll, value, 1);
  out[out_index()] = value;
}

template <bool bad>
__global__ void shuffle_at_two_sites(int* out, const int*) {
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x % 32 < 16) {
    value = __shfl_xor_sync(bad ? kAll : 0x0000ffffu, value, 1);
  } else {
    value = __shfl_xor_sync(bad ? kAll : 0xffff0000u, value, 1);
  }
  out[out_index()] = value;
}

template <bool bad>
__global__ void shuffle_from_outside(int* out, const int*) {
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x % 32 < 16) value = __shfl_xor_sync(0x0000ffffu, value, bad ? 16 : 8);
  out[out_index()] = value;
}

template <bool bad>
__global__ void shuffle_with_a_lane_gone(int* out, const int*) {
  out[out_index()] = static_cast<int>(threadIdx.x) ^ 1;
  if (bad && threadIdx.x % 32 == 31) return;
  out[out_index()] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
}

template <bool bad>
__global__ void matrix_product_by_half_a_warp(int* out, const int*) {
  const std::uint32_t a[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};  // ones
  float d[4] = {};
  if (!bad || threadIdx.x % 32 >= 16) skvq::cuda::ptx::mma_f16(d, a, a[0], a[1]);
  out[out_index()] = bad ? 16 : static_cast<int>(d[0]);
}

struct Words {
  int words[kThreads];
};

template <bool bad>
__global__ void missing_syncwarp(int* out, const int*) {
  SKVQ_SHARED(Words, shared);
  shared.words[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!bad) __syncwarp();
  out[out_index()] = shared.words[threadIdx.x ^ 1];
}

// A shuffle brings lanes together, but it does not order what they do to memory.
template <bool bad>
__global__ void shuffle_instead_of_syncwarp(int* out, const int*) {
  SKVQ_SHARED(Words, shared);
  shared.words[threadIdx.x] = static_cast<int>(threadIdx.x);
  const int one = __shfl_sync(kAll, 1, 0);
  if (!bad) __syncwarp();
  out[out_index()] = shared.words[static_cast<int>(threadIdx.x) ^ one];
}

int neighbour(int, int thread) {
  return thread ^ 1;
}

}  // namespace

Cases warps() {
  return {SIMT_CASE(mask_without_caller, neighbour),
          SIMT_CASE(masks_differ, [](int, int thread) { return thread ^ 2; }),
          SIMT_CASE(shuffle_under_condition, neighbour),
          SIMT_CASE(shuffle_at_two_sites, neighbour),
          SIMT_CASE(shuffle_from_outside, [](int, int thread) { return thread % 32 < 16 ? thread ^ 8 : thread; }),
          SIMT_CASE(shuffle_with_a_lane_gone, neighbour),
          SIMT_CASE(matrix_product_by_half_a_warp, [](int, int) { return 16; }),
          SIMT_CASE(missing_syncwarp, neighbour),
          SIMT_CASE(shuffle_instead_of_syncwarp, neighbour)};
}

}  // namespace simt::broken

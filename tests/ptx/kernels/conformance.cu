// One kernel per wrapper of csrc/cuda/ptx.cuh, so small that what it should give is one line of numpy. One warp each.
#include "cuda/ptx.cuh"
#include "skvq/arrangement.h"

namespace ptx = skvq::cuda::ptx;
using skvq::cuda::lane_index;
using std::uint16_t, std::uint32_t, std::uint64_t, std::uint8_t;

namespace {

struct Staged {
  uint4 rows[64];
};

// Registers of a 16 x 16 matrix of 16-bit elements as skvq::Mma deals them out.
__device__ void fragment_a(uint32_t (&a)[4], const uint16_t* matrix) {
  for (int reg = 0; reg < 4; ++reg) {
    a[reg] = 0;
    for (int half = 0; half < 2; ++half) {
      const skvq::Mma::Element e = skvq::Mma::element(lane_index(), reg, half);
      a[reg] |= static_cast<uint32_t>(matrix[e.row * 16 + e.column]) << (16 * half);
    }
  }
}

// Register `reg` of a 16 x 8 matrix as the comment on ptx::mma_f16 says.
__device__ uint32_t fragment_b(const uint16_t* matrix, int reg) {
  const int row = 2 * (lane_index() % 4) + 8 * reg, column = lane_index() / 4;
  return matrix[row * 8 + column] | static_cast<uint32_t>(matrix[(row + 1) * 8 + column]) << 16;
}

template <bool Bf16>
__device__ void multiply(const uint16_t* a, const uint16_t* b, float* d) {
  uint32_t fragment[4];
  fragment_a(fragment, a);
  const int row = lane_index() / 4, column = 2 * (lane_index() % 4);
  float* place[4] = {d + row * 8 + column, d + row * 8 + column + 1, d + (row + 8) * 8 + column,
                     d + (row + 8) * 8 + column + 1};
  float sum[4] = {*place[0], *place[1], *place[2], *place[3]};
  if constexpr (Bf16) {
    ptx::mma_bf16(sum, fragment, fragment_b(b, 0), fragment_b(b, 1));
  } else {
    ptx::mma_f16(sum, fragment, fragment_b(b, 0), fragment_b(b, 1));
  }
  for (int i = 0; i < 4; ++i) *place[i] = sum[i];
}

// Four 8 x 8 matrices, rows one after the other, through shared memory.
template <bool Transposed>
__device__ void matrices(const uint4* rows, uint32_t* out) {
  SKVQ_SHARED(Staged, staged);
  staged.rows[lane_index()] = rows[lane_index()];
  __syncwarp();
  uint32_t a[4];
  if constexpr (Transposed) {
    ptx::load_matrices_transposed(a, &staged.rows[lane_index()]);
  } else {
    ptx::load_matrices(a, &staged.rows[lane_index()]);
  }
  for (int i = 0; i < 4; ++i) out[i * 32 + lane_index()] = a[i];
}

}  // namespace

extern "C" {

// d += A B; A 16 x 16, B 16 x 8, d 16 x 8.
__global__ void conform_mma_f16(const uint16_t* a, const uint16_t* b, float* d) {
  multiply<false>(a, b, d);
}
__global__ void conform_mma_bf16(const uint16_t* a, const uint16_t* b, float* d) {
  multiply<true>(a, b, d);
}

__global__ void conform_transpose_8x8(const uint32_t* x, uint32_t* out) {
  out[lane_index()] = ptx::transpose_8x8(x[lane_index()]);
}
__global__ void conform_load_matrices(const uint4* rows, uint32_t* out) {
  matrices<false>(rows, out);
}
__global__ void conform_load_matrices_transposed(const uint4* rows, uint32_t* out) {
  matrices<true>(rows, out);
}

__global__ void conform_unpack_e4m3(const uint16_t* pairs, uint32_t* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  out[i] = ptx::unpack_e4m3(pairs[i]);
}
__global__ void conform_pairs(const uint32_t* a, const uint32_t* b, uint32_t* add, uint32_t* min_f16, uint32_t* max_f16,
                              uint32_t* min_bf16, uint32_t* max_bf16) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  add[i] = ptx::add_f16x2(a[i], b[i]);
  min_f16[i] = ptx::min_f16x2(a[i], b[i]);
  max_f16[i] = ptx::max_f16x2(a[i], b[i]);
  min_bf16[i] = ptx::min_bf16x2(a[i], b[i]);
  max_bf16[i] = ptx::max_bf16x2(a[i], b[i]);
}
__global__ void conform_floats(const float* a, const float* b, float* ex2, float* min, float* max, float* reciprocal) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  ex2[i] = ptx::ex2(a[i]);
  min[i] = ptx::min_f32(a[i], b[i]);
  max[i] = ptx::max_f32(a[i], b[i]);
  reciprocal[i] = ptx::reciprocal(a[i]);
}
__global__ void conform_pack(const float* low, const float* high, uint32_t* f16, uint32_t* bf16) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  f16[i] = ptx::pack_f16(low[i], high[i]);
  bf16[i] = ptx::pack_bf16(low[i], high[i]);
}
__global__ void conform_unpack(const uint32_t* pairs, float2* f16, float2* bf16) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const ptx::Floats2 f = ptx::unpack_f16(pairs[i]), b = ptx::unpack_bf16(pairs[i]);
  f16[i] = make_float2(f.low, f.high);
  bf16[i] = make_float2(b.low, b.high);
}
// Two groups of copies: what a thread sees of each before and after it waits. Lane l reads l % 17 of the 16 bytes.
__global__ void conform_copy_async(const uint4* from, uint4* before, uint4* first, uint4* second) {
  SKVQ_SHARED(Staged, staged);
  const int lane = lane_index();
  ptx::copy_async_16(&staged.rows[lane], from + lane, lane % 17);
  ptx::commit_copies();
  ptx::copy_async_16(&staged.rows[32 + lane], from + 32 + lane);
  ptx::commit_copies();
  before[lane] = staged.rows[lane];
  ptx::wait_copies<1>();
  first[lane] = staged.rows[lane], first[32 + lane] = staged.rows[32 + lane];
  ptx::wait_copies<0>();
  second[lane] = staged.rows[lane], second[32 + lane] = staged.rows[32 + lane];
}

// A struct by value: a kernel's arguments as the backend passes them.
struct Offset {
  const uint32_t* data;
  uint8_t kind;
  int offsets[3];
  float factor;
};
__global__ void conform_struct(Offset offset, int which, float* out) {
  const int lane = lane_index();
  out[lane] = static_cast<float>(offset.data[lane] + offset.offsets[which]) * offset.factor + offset.kind;
}

// Two rounds over one buffer and one barrier, so that both parities occur; the last warp does not copy.
__global__ void conform_copy_bulk(const uint4* from, uint4* out) {
#if SKVQ_HAS_BULK_COPY
  SKVQ_SHARED(Staged, staged);
  SKVQ_SHARED(uint64_t, barrier);
  if (threadIdx.x == 0) {
    ptx::barrier_init(&barrier, 1);
    ptx::barrier_init_fence();
  }
  __syncthreads();
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x == 0) {
      ptx::barrier_arrive_expect(&barrier, 512);
      ptx::copy_bulk(staged.rows, from + 32 * round, 256, &barrier);
      ptx::copy_bulk(staged.rows + 16, from + 32 * round + 16, 256, &barrier);
    }
    ptx::barrier_wait(&barrier, round % 2);
    out[round * blockDim.x + threadIdx.x] = staged.rows[lane_index()];
    ptx::proxy_fence();
    __syncthreads();
  }
#endif
}

}  // extern "C"

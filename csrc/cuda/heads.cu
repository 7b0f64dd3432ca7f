// The maps at the door of the cache, and the gather of channels.
//
// Every row is computed by itself and in one order of sums, without contraction, so that a token becomes the same bytes
// in any company and on the CPU too (csrc/cpu/heads_kernel.h).
#include "core/head_tables.h"
#include "core/minifloat.h"
#include "core/window.h"
#include "cuda/launch.cuh"
#include "cuda/unroll.cuh"

namespace skvq::cuda {
namespace {

constexpr int kRows = 8;    // of one KV head that a block maps together: they share what is read of the matrix
constexpr int kDepth = 16;  // rows of the matrix that a thread reads ahead; head_dim is a multiple
constexpr int kGatherThreads = 256;

// Rows of a KV head are numbered token by token, head by head.
struct HeadRow {
  std::int64_t token;
  int head;
};

template <class F>
SKVQ_DEVICE void each_row(const MapHeadsArgs& a, F&& visit) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kRows;
  const int kv_head = static_cast<int>(blockIdx.y);
  std::int64_t token = first / a.ratio;
  int of_kv_head = static_cast<int>(first - token * a.ratio);
  unroll<kRows>([&](auto r) {
    if (token < a.num_tokens) visit(r, HeadRow{token, kv_head * a.ratio + of_kv_head});
    if (++of_kv_head == a.ratio) {
      of_kv_head = 0;
      ++token;
    }
  });
}

// Channel `channel` of u times the matrix, for all rows; u is [kRows][dim].
SKVQ_DEVICE void multiply(const float* u, const float* matrix, int dim, int channel, float (&sums)[kRows]) {
  const float* column = matrix + channel;
  for (int i = 0; i < dim; i += kDepth) {
    float m[kDepth];
    unroll<kDepth>([&](auto j) { m[j] = column[static_cast<std::int64_t>(i + j) * dim]; });
    unroll<kRows>([&](auto r) {
      unroll<kDepth / 4>([&](auto quad) {
        const float4 x = *reinterpret_cast<const float4*>(u + r * dim + i + quad * 4);
        sums[r] += x.x * m[quad * 4];
        sums[r] += x.y * m[quad * 4 + 1];
        sums[r] += x.z * m[quad * 4 + 2];
        sums[r] += x.w * m[quad * 4 + 3];
      });
    });
  }
}

// What is multiplied: on its way in a row with everything else done to it, on its way out the row as it is.
SKVQ_DEVICE float operand(const MapHeadsArgs& a, const HeadTables& t, const HeadRow& row, int channel) {
  const std::int64_t at = row.token * a.x.token_stride + row.head * a.x.head_stride;
  if (a.leave) return load_float(a.dtype, a.x.data, at + channel);
  const int from = t.permutation ? t.permutation[channel] : channel;
  const float x = load_float(a.dtype, a.x.data, at + from);
  const float centred = t.shift ? x - t.shift[from] : x;
  return t.scale ? centred * t.scale[channel] : centred;
}

SKVQ_DEVICE void store_result(const MapHeadsArgs& a, const HeadTables& t, const HeadRow& row, int channel, float y) {
  const std::int64_t index = row.token * a.num_heads + row.head, at = index * a.head_dim;
  if (!a.leave) return store_float(a.dtype, a.out, at + channel, y);
  const int to = t.permutation ? t.permutation[channel] : channel;
  const float scaled = t.scale ? y * t.scale[channel] : y;
  const float share = a.share ? a.share[index] : 1.0f;
  store_float(a.dtype, a.out, at + to, t.shift ? scaled + share * t.shift[to] : scaled);
}

// Blocks (rows by kRows, KV heads), a thread for a channel.
__global__ void __launch_bounds__(kMaxHeadDim) map_rows(const __grid_constant__ MapHeadsArgs a) {
  SKVQ_DYNAMIC_SHARED(shared);
  float* u = reinterpret_cast<float*>(shared);
  const HeadTables tables = tables_of(a, static_cast<int>(blockIdx.y));
  const int channel = static_cast<int>(threadIdx.x);
  const bool active = channel < a.head_dim;
  float sums[kRows] = {};
  if (active) {
    each_row(a, [&](auto r, const HeadRow& row) { sums[r] = operand(a, tables, row, channel); });
  }
  if (tables.matrix != nullptr) {
    unroll<kRows>([&](auto r) {
      if (active) u[r * a.head_dim + channel] = sums[r];
      sums[r] = 0.0f;
    });
    __syncthreads();
    if (active) multiply(u, tables.matrix, a.head_dim, channel, sums);
  }
  if (active) {
    each_row(a, [&](auto r, const HeadRow& row) { store_result(a, tables, row, channel, sums[r]); });
  }
}

// A warp for each row of a head.
template <class T>
__global__ void __launch_bounds__(kGatherThreads) gather_channels(const __grid_constant__ PermuteArgs a) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kGatherThreads / kWarp) + warp_index();
  if (row >= a.num_rows * a.num_heads) return;
  const T* x = static_cast<const T*>(a.x) + row * a.head_dim;
  T* out = static_cast<T*>(a.out) + row * a.head_dim;
  const std::int32_t* from = a.permutation + row % a.num_heads * a.head_dim;
  for (int c = lane_index(); c < a.head_dim; c += kWarp) out[c] = x[from[c]];
}

}  // namespace

void map_heads(const MapHeadsArgs& a, Stream stream) {
  const std::int64_t rows = a.num_tokens * a.ratio;
  const Grid grid{(rows + kRows - 1) / kRows, a.num_heads / a.ratio};
  const int threads = (a.head_dim + kWarp - 1) / kWarp * kWarp;
  const std::size_t shared_bytes = a.matrix ? static_cast<std::size_t>(kRows) * a.head_dim * sizeof(float) : 0;
  launch("map_rows", map_rows, grid, threads, shared_bytes, stream, a);
}

void permute_channels(const PermuteArgs& a, Stream stream) {
  constexpr int kRowsPerBlock = kGatherThreads / kWarp;
  const Grid grid{(a.num_rows * a.num_heads + kRowsPerBlock - 1) / kRowsPerBlock};
  if (a.element_bytes == 4) {
    launch("gather_channels", gather_channels<std::uint32_t>, grid, kGatherThreads, 0, stream, a);
  } else {
    launch("gather_channels", gather_channels<std::uint16_t>, grid, kGatherThreads, 0, stream, a);
  }
}

}  // namespace skvq::cuda

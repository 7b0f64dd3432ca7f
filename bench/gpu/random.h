// Random numbers made on the device; the same on every run.
#pragma once

#include "core/minifloat.h"
#include "cuda/launch.cuh"
#include "gpu/runtime.h"

namespace skvq::bench {

// The finalizer of MurmurHash3 (64 bits): every bit of `x` reaches every bit of the result.
__host__ __device__ inline std::uint64_t mix(std::uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return x ^ (x >> 33);
}

// About normal: the sum of eight bytes, which are uniform, scaled to variance 1.
[[maybe_unused]] static __global__ void normal_rows(DType dtype, void* out, std::int64_t count, std::uint64_t seed) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    const std::uint64_t bits = mix(static_cast<std::uint64_t>(i) + (seed << 40));
    int sum = 0;
    for (int byte = 0; byte < 8; ++byte) sum += static_cast<int>(bits >> 8 * byte & 0xff);
    store_float(dtype, out, i, (static_cast<float>(sum) - 1020.0f) * (1.0f / 209.0f));
  }
}

[[maybe_unused]] static __global__ void random_words(std::uint64_t* out, std::int64_t count) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride)
    out[i] = mix(i + 1);
}

inline void fill_normal(DType dtype, void* out, std::int64_t count, std::uint64_t seed, cudaStream_t stream) {
  cuda::launch("normal_rows", normal_rows, {std::min<std::int64_t>(4096, (count + 255) / 256)}, 256, 0, stream, dtype,
               out, count, seed);
}
inline void fill_random(const DeviceBytes& buffer, cudaStream_t stream) {
  const auto count = static_cast<std::int64_t>(buffer.size() / sizeof(std::uint64_t));
  cuda::launch("random_words", random_words, {std::min<std::int64_t>(4096, (count + 255) / 256)}, 256, 0, stream,
               buffer.as<std::uint64_t>(), count);
}

}  // namespace skvq::bench

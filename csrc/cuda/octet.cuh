// Eight adjacent channels of a row, as they lie in memory: what one lane loads, and its range.
#pragma once

#include "cuda/append_params.cuh"
#include "cuda/ptx.cuh"

namespace skvq::cuda {

// Passes whose values a warp holds at once (OctetDeal): what registers allow.
template <DType D>
inline constexpr int kPasses = D == DType::kF32 ? 4 : 8;

template <DType D>
struct Octet {
  static constexpr int kWords = kOctet * dtype_bytes(D) / 4;
  std::uint32_t words[kWords];
};

template <DType D>
SKVQ_DEVICE Octet<D> load_octet(const unsigned char* p) {
  Octet<D> x;
#pragma unroll
  for (int i = 0; i < Octet<D>::kWords; i += 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(p + i * 4);
    x.words[i] = v.x;
    x.words[i + 1] = v.y;
    x.words[i + 2] = v.z;
    x.words[i + 3] = v.w;
  }
  return x;
}
// The same for rows that start anywhere.
template <DType D>
SKVQ_DEVICE Octet<D> load_octet_by_channel(const unsigned char* p) {
  Octet<D> x;
#pragma unroll
  for (int i = 0; i < Octet<D>::kWords; ++i) {
    if constexpr (D == DType::kF32) {
      x.words[i] = reinterpret_cast<const std::uint32_t*>(p)[i];
    } else {
      const std::uint16_t* halves = reinterpret_cast<const std::uint16_t*>(p) + 2 * i;
      x.words[i] = halves[0] | static_cast<std::uint32_t>(halves[1]) << 16;
    }
  }
  return x;
}

// Channels 2 i and 2 i + 1.
template <DType D>
SKVQ_DEVICE ptx::Floats2 floats_at(const Octet<D>& x, int i) {
  if constexpr (D == DType::kF32) return {bits_float(x.words[2 * i]), bits_float(x.words[2 * i + 1])};
  if constexpr (D == DType::kF16) return ptx::unpack_f16(x.words[i]);
  return ptx::unpack_bf16(x.words[i]);
}

// Minimum and maximum of some channels, in words like theirs: two numbers side by side where these have 16 bits. A NaN
// among the channels is the result.
struct alignas(8) Extremes {
  std::uint32_t least, most;
};

template <DType D>
SKVQ_DEVICE std::uint32_t lesser(std::uint32_t a, std::uint32_t b) {
  if constexpr (D == DType::kF32) return float_bits(ptx::min_f32(bits_float(a), bits_float(b)));
  if constexpr (D == DType::kF16) return ptx::min_f16x2(a, b);
  return ptx::min_bf16x2(a, b);
}
template <DType D>
SKVQ_DEVICE std::uint32_t greater(std::uint32_t a, std::uint32_t b) {
  if constexpr (D == DType::kF32) return float_bits(ptx::max_f32(bits_float(a), bits_float(b)));
  if constexpr (D == DType::kF16) return ptx::max_f16x2(a, b);
  return ptx::max_bf16x2(a, b);
}
template <DType D>
SKVQ_DEVICE Extremes join(Extremes a, Extremes b) {
  return {lesser<D>(a.least, b.least), greater<D>(a.most, b.most)};
}

template <DType D>
SKVQ_DEVICE Extremes extremes_of(const Octet<D>& x) {
  Extremes e{x.words[0], x.words[0]};
#pragma unroll
  for (int i = 1; i < Octet<D>::kWords; ++i) e = join<D>(e, {x.words[i], x.words[i]});
  return e;
}

struct Range {
  float low, high;
  bool finite;  // no channel was a NaN or an infinity
};

template <DType D>
SKVQ_DEVICE Range range_of(Extremes e) {
  Range r;
  if constexpr (D == DType::kF32) {
    r = {bits_float(e.least), bits_float(e.most), false};
  } else {
    const bool f16 = D == DType::kF16;
    const ptx::Floats2 least = f16 ? ptx::unpack_f16(e.least) : ptx::unpack_bf16(e.least);
    const ptx::Floats2 most = f16 ? ptx::unpack_f16(e.most) : ptx::unpack_bf16(e.most);
    r = {ptx::min_f32(least.low, least.high), ptx::max_f32(most.low, most.high), false};
  }
  r.finite = r.low * 0.0f + r.high * 0.0f == 0.0f;
  return r;
}

}  // namespace skvq::cuda

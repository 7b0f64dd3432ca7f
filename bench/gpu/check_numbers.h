// Conversions and arithmetic of csrc/cuda/ptx.cuh on the device against core/minifloat.h and the C library.
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "gpu/findings.h"
#include "gpu/runtime.h"

namespace skvq::bench {

// One instruction each, for `elementwise`. A number in or out is 32 bits.
struct UnpackE4m3 {
  SKVQ_DEVICE std::uint32_t operator()(std::uint32_t x, std::uint32_t) const { return cuda::ptx::unpack_e4m3(x); }
};
struct PackF16 {
  SKVQ_DEVICE std::uint32_t operator()(std::uint32_t x, std::uint32_t y) const {
    return cuda::ptx::pack_f16(bits_float(x), bits_float(y));
  }
};
struct PackBf16 {
  SKVQ_DEVICE std::uint32_t operator()(std::uint32_t x, std::uint32_t y) const {
    return cuda::ptx::pack_bf16(bits_float(x), bits_float(y));
  }
};
// The low number of a pair, or the high one where y is 1.
struct UnpackF16 {
  SKVQ_DEVICE std::uint32_t operator()(std::uint32_t x, std::uint32_t y) const {
    const cuda::ptx::Floats2 f = cuda::ptx::unpack_f16(x);
    return float_bits(y == 0 ? f.low : f.high);
  }
};
struct UnpackBf16 {
  SKVQ_DEVICE std::uint32_t operator()(std::uint32_t x, std::uint32_t y) const {
    const cuda::ptx::Floats2 f = cuda::ptx::unpack_bf16(x);
    return float_bits(y == 0 ? f.low : f.high);
  }
};
struct AddF16 {
  SKVQ_DEVICE std::uint32_t operator()(std::uint32_t x, std::uint32_t y) const { return cuda::ptx::add_f16x2(x, y); }
};
struct Ex2 {
  SKVQ_DEVICE std::uint32_t operator()(std::uint32_t x, std::uint32_t) const {
    return float_bits(cuda::ptx::ex2(bits_float(x)));
  }
};

template <class Operation>
__global__ void elementwise(Operation operation, const std::uint32_t* x, const std::uint32_t* y, std::uint32_t* out,
                            int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = operation(x[i], y[i]);
}

using Words = std::vector<std::uint32_t>;

template <class Operation>
Words on_device(Operation operation, const Words& x, const Words& y) {
  const DeviceBytes in_x(x), in_y(y), out(x.size() * 4);
  out.fill(0xa5);
  const auto count = static_cast<int>(x.size());
  cuda::launch("elementwise", elementwise<Operation>, {(count + 127) / 128}, 128, 0, nullptr, operation,
               in_x.as<const std::uint32_t>(), in_y.as<const std::uint32_t>(), out.as<std::uint32_t>(), count);
  return out.download<std::uint32_t>();
}

// Equal halves of either format; any NaN is as good as any other.
inline bool same_half(std::uint32_t a, std::uint32_t b, std::uint32_t infinity) {
  const bool nan_a = (a & 0x7fffu) > infinity, nan_b = (b & 0x7fffu) > infinity;
  return nan_a || nan_b ? nan_a && nan_b : a == b;
}
inline bool same_float(std::uint32_t a, float b) {
  return std::isnan(b) ? std::isnan(bits_float(a)) : a == float_bits(b);
}
inline bool same_halves(std::uint32_t a, std::uint32_t low, std::uint32_t high, std::uint32_t infinity) {
  return same_half(a & 0xffffu, low, infinity) && same_half(a >> 16, high, infinity);
}

// Every half and bf16, what lies between neighbours, and floats of any bits.
inline Words interesting_floats() {
  Words x;
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    const float half = half_to_float(static_cast<std::uint16_t>(h));
    const float next = half_to_float(static_cast<std::uint16_t>(h + 1));
    const std::uint32_t middle = float_bits(0.5f * half + 0.5f * next), bf16 = h << 16 | 0x8000u;
    for (const std::uint32_t bits : {float_bits(half), middle, middle + 1, middle - 1, bf16, bf16 + 1, bf16 - 1}) {
      x.push_back(bits);
    }
  }
  std::mt19937 generator(1);
  for (int i = 0; i < 1 << 18; ++i) x.push_back(static_cast<std::uint32_t>(generator()));
  return x;
}

inline void check_e4m3(Findings& findings) {
  Words x;
  for (std::uint32_t i = 0; i < 256; ++i) x.push_back(i | (i * 7 + 3) % 256 << 8);
  const Words out = on_device(UnpackE4m3{}, x, x);
  Tally tally;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto low = float_to_half(e4m3_to_float(static_cast<std::uint8_t>(x[i])));
    const auto high = float_to_half(e4m3_to_float(static_cast<std::uint8_t>(x[i] >> 8)));
    tally.check(same_halves(out[i], low, high, 0x7c00u), "e4m3 pair ", x[i], " gave ", out[i]);
  }
  findings.add("e4m3 to fp16, all 256", tally.ok(), tally.text(), tally.figures());
}

inline void check_packing(Findings& findings) {
  const Words x = interesting_floats();
  const Words y(x.rbegin(), x.rend());
  const Words f16 = on_device(PackF16{}, x, y), bf16 = on_device(PackBf16{}, x, y);
  Tally half, brain;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float low = bits_float(x[i]), high = bits_float(y[i]);
    half.check(same_halves(f16[i], float_to_half(low), float_to_half(high), 0x7c00u), low, " and ", high, " gave ",
               f16[i]);
    brain.check(same_halves(bf16[i], float_to_bf16(low), float_to_bf16(high), 0x7f80u), low, " and ", high, " gave ",
                bf16[i]);
  }
  findings.add("fp32 to fp16, rounding", half.ok(), half.text(), half.figures());
  findings.add("fp32 to bf16, rounding", brain.ok(), brain.text(), brain.figures());
}

inline void check_unpacking(Findings& findings) {
  Words x, which;
  for (std::uint32_t i = 0; i < 0x20000; ++i) {
    x.push_back((i & 0xffffu) | (~i & 0xffffu) << 16);
    which.push_back(i >> 16);
  }
  const Words f16 = on_device(UnpackF16{}, x, which), bf16 = on_device(UnpackBf16{}, x, which);
  Tally half, brain;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto bits = static_cast<std::uint16_t>(which[i] == 0 ? x[i] : x[i] >> 16);
    half.check(same_float(f16[i], half_to_float(bits)), "fp16 ", bits, " gave ", bits_float(f16[i]));
    brain.check(same_float(bf16[i], bf16_to_float(bits)), "bf16 ", bits, " gave ", bits_float(bf16[i]));
  }
  findings.add("fp16 to fp32, all 65536", half.ok(), half.text(), half.figures());
  findings.add("bf16 to fp32, all 65536", brain.ok(), brain.text(), brain.figures());
}

inline void check_half_sums(Findings& findings) {
  std::mt19937 generator(2);
  Words x(1 << 18), y(x.size());
  for (auto* words : {&x, &y}) {
    for (std::uint32_t& w : *words) w = static_cast<std::uint32_t>(generator());
  }
  const Words out = on_device(AddF16{}, x, y);
  Tally tally;
  const auto sum = [](std::uint32_t a, std::uint32_t b) {
    return float_to_half(half_to_float(static_cast<std::uint16_t>(a)) + half_to_float(static_cast<std::uint16_t>(b)));
  };
  for (std::size_t i = 0; i < x.size(); ++i) {
    tally.check(same_halves(out[i], sum(x[i], y[i]), sum(x[i] >> 16, y[i] >> 16), 0x7c00u), x[i], " + ", y[i], " gave ",
                out[i]);
  }
  findings.add("fp16 sums, subnormals included", tally.ok(), tally.text(), tally.figures());
}

inline void check_ex2(Findings& findings) {
  Words x;
  for (int i = -150 * 512; i <= 127 * 512; ++i) x.push_back(float_bits(static_cast<float>(i) / 512.0f + 1e-4f));
  for (int i = -200; i < 128; ++i) x.push_back(float_bits(static_cast<float>(i)));
  for (const float special : {-INFINITY, -1e30f, -0.0f, 0.0f}) x.push_back(float_bits(special));
  const Words out = on_device(Ex2{}, x, x);
  Tally tally;
  double worst = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double argument = bits_float(x[i]), want = std::exp2(argument), got = bits_float(out[i]);
    if (want < 0x1p-126) {
      tally.check(got == 0.0 || (want > 0x1p-127 && got > 0.0 && got <= 0x1p-126), "2^", argument, " gave ", got);
      continue;
    }
    const double error = std::fabs(got - want) / want;
    worst = error > worst ? error : worst;
    tally.check(error <= 0x1p-22, "2^", argument, " gave ", got);
  }
  tally.check(bits_float(out[x.size() - 1]) == 1.0f && bits_float(out[x.size() - 2]) == 1.0f, "2^0 is not 1");
  findings.add("ex2, -200 to 127", tally.ok(), concat(tally.text(), ", largest relative error ", worst),
               tally.figures().add("max_relative_error", worst));
}

inline void check_numbers(Findings& findings) {
  check_e4m3(findings);
  check_packing(findings);
  check_unpacking(findings);
  check_half_sums(findings);
  check_ex2(findings);
}

}  // namespace skvq::bench

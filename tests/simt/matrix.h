// Instructions on matrices: mma, movmatrix, ldmatrix. Layouts as in the PTX ISA, sections "Matrix Fragments for
// mma.m16n8k16 with floating point type", "movmatrix" and "ldmatrix".
#pragma once

#include <cmath>

#include "simt/collectives.h"
#include "simt/shared.h"

namespace simt {

enum class Half { kF16, kBf16 };

// On hardware: relative error 2^-22, subnormal results are 0.
SIMT_RUNTIME inline float ex2(float x) {
  const float y = ::exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

SIMT_RUNTIME inline float float_of_bits(std::uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
SIMT_RUNTIME inline float float_of(Half type, std::uint32_t half) {
  if (type == Half::kBf16) return float_of_bits(half << 16);
  const std::uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  // Placed as the bits of a float the value is too small by 2^112; infinities and NaN need the highest exponent.
  const float value = float_of_bits(magnitude << 13) * 0x1p112f;
  const std::uint32_t bits =
      magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : __builtin_bit_cast(std::uint32_t, value);
  return float_of_bits(sign | bits);
}

struct MmaOperands {
  std::uint32_t a[4], b[2];
  float d[4];
};
struct Fragment {
  float d[4];
};
struct Matrices {
  float a[16][16], b[16][8], d[16][8];
};

SIMT_RUNTIME inline void gather(Matrices& m, Half type, const MmaOperands& in, unsigned lane) {
  const unsigned row = lane / 4, column = lane % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) {
    float* a = &m.a[row + i % 2 * 8][column + i / 2 * 8];
    a[0] = float_of(type, in.a[i] & 0xffffu);
    a[1] = float_of(type, in.a[i] >> 16);
  }
  for (unsigned i = 0; i < 2; ++i) {
    m.b[column + i * 8][row] = float_of(type, in.b[i] & 0xffffu);
    m.b[column + i * 8 + 1][row] = float_of(type, in.b[i] >> 16);
  }
  for (unsigned i = 0; i < 4; ++i) m.d[row + i / 2 * 8][column + i % 2] = in.d[i];
}

// Products of halves are exact in float; sums go by k.
template <Half type>
SIMT_RUNTIME inline void multiply(Warp& w, unsigned) {
  Matrices m;
  for (unsigned lane = 0; lane < kLanes; ++lane) gather(m, type, in_of<MmaOperands>(w, lane), lane);
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) m.d[i][j] += m.a[i][k] * m.b[k][j];
    }
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    float* d = out_of<Fragment>(w, lane).d;
    for (unsigned i = 0; i < 4; ++i) d[i] = m.d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

__attribute__((noinline)) SIMT_RUNTIME inline void mma_16816(float (&d)[4], const std::uint32_t (&a)[4],
                                                             std::uint32_t b0, std::uint32_t b1, Half type,
                                                             Location here) {
  const MmaOperands in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  const Collective c{"mma.m16n8k16", ~0u, here, true, false};
  const Fragment out = type == Half::kF16 ? collective<Fragment>(c, in, multiply<Half::kF16>)
                                          : collective<Fragment>(c, in, multiply<Half::kBf16>);
  for (int i = 0; i < 4; ++i) d[i] = out.d[i];
}

// Element `column` of the row that lanes 4 row .. 4 row + 3 hold.
SIMT_RUNTIME inline std::uint32_t half_of(std::uint32_t word, unsigned column) {
  return word >> column % 2 * 16 & 0xffffu;
}

__attribute__((noinline)) SIMT_RUNTIME inline std::uint32_t movmatrix(std::uint32_t x, Location here) {
  return collective<std::uint32_t>({"movmatrix", ~0u, here, true, false}, x, [](Warp& w, unsigned) SIMT_RUNTIME {
    const auto element = [&](unsigned row, unsigned column)
                             SIMT_RUNTIME { return half_of(in_of<std::uint32_t>(w, row * 4 + column / 2), column); };
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const unsigned row = lane / 4, column = lane % 4 * 2;
      out_of<std::uint32_t>(w, lane) = element(column, row) | element(column + 1, row) << 16;
    }
  });
}

struct MatrixRow {
  std::uint32_t words[4];
};

// Instrumented: the lane that names a row reads it.
__attribute__((noinline)) inline MatrixRow read_row(const void* row) {
  const MatrixRow value = *static_cast<const MatrixRow*>(row);
  return value;
}

template <bool transposed>
SIMT_RUNTIME inline void distribute(Warp& w, unsigned) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const unsigned row = lane / 4, column = lane % 4 * 2;
    MatrixRow& out = out_of<MatrixRow>(w, lane);
    for (unsigned i = 0; i < 4; ++i) {
      const auto word = [&](unsigned r, unsigned c)
                            SIMT_RUNTIME { return in_of<MatrixRow>(w, i * 8 + r).words[c / 2]; };
      out.words[i] =
          transposed ? half_of(word(column, row), row) | half_of(word(column + 1, row), row) << 16 : word(row, column);
    }
  }
}

__attribute__((noinline)) SIMT_RUNTIME inline void ldmatrix_x4(std::uint32_t (&a)[4], const void* row, bool transposed,
                                                               Location here) {
  const Fiber& f = *current;
  if (!is_aligned(row, 16)) fail("ldmatrix at %s:%u: row %p is not aligned to 16 bytes", SIMT_AT(here), row);
  if (!is_shared(*f.block, row, 16)) {
    fail("ldmatrix at %s:%u: the row is not in the shared memory of this block", SIMT_AT(here));
  }
  saw_read(row, 16, SIMT_CALLER);
  const MatrixRow in = read_row(row);
  const Collective c{transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, here, true, false};
  const MatrixRow out =
      transposed ? collective<MatrixRow>(c, in, distribute<true>) : collective<MatrixRow>(c, in, distribute<false>);
  for (int i = 0; i < 4; ++i) a[i] = out.words[i];
}

}  // namespace simt

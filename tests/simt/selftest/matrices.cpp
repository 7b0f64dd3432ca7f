// mma, movmatrix and ldmatrix. Where elements lie is what skvq::Mma says of A, and the comments of ptx.cuh of the rest.
#include <cmath>
#include <random>

#include "simt/selftest/grid.h"
#include "skvq/arrangement.h"

namespace simt::selftest {
namespace {

using skvq::Mma;
namespace ptx = skvq::cuda::ptx;

struct Matrices {
  std::uint16_t a[16][16], b[16][8];
  float d[16][8];
};

__global__ void multiply(Matrices* m, bool bf16) {
  const int lane = static_cast<int>(threadIdx.x);
  std::uint32_t a[4] = {}, b[2] = {};
  for (int reg = 0; reg < 4; ++reg) {
    for (int half = 0; half < 2; ++half) {
      const Mma::Element e = Mma::element(lane, reg, half);
      a[reg] |= static_cast<std::uint32_t>(m->a[e.row][e.column]) << 16 * half;
      if (reg < 2) b[reg] |= static_cast<std::uint32_t>(m->b[lane % 4 * 2 + half + 8 * reg][lane / 4]) << 16 * half;
    }
  }
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = m->d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  if (bf16) {
    ptx::mma_bf16(d, a, b[0], b[1]);
  } else {
    ptx::mma_f16(d, a, b[0], b[1]);
  }
  for (int i = 0; i < 4; ++i) m->d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = d[i];
}

float value(std::uint16_t half, bool bf16) {
  return bf16 ? skvq::bf16_to_float(half) : skvq::half_to_float(half);
}

// Random halves of all magnitudes that stay finite in products; subnormals among them.
void check_random_product(bool bf16, unsigned seed) {
  std::mt19937 generator(seed);
  Matrices m;
  const auto half = [&] {
    const std::uint32_t exponent = bf16 ? 100 + generator() % 50 : generator() % 24;
    const std::uint32_t bits = generator() & (bf16 ? 0x807fu : 0x83ffu);
    return static_cast<std::uint16_t>(bits | exponent << (bf16 ? 7 : 10));
  };
  for (auto& row : m.a) {
    for (auto& x : row) x = half();
  }
  for (auto& row : m.b) {
    for (auto& x : row) x = half();
  }
  for (auto& row : m.d) {
    for (auto& x : row) x = value(half(), bf16);
  }
  const Matrices before = m;
  launch(multiply, 1, 32, 0, &m, bf16);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = before.d[i][j];
      for (int k = 0; k < 16; ++k) sum += value(before.a[i][k], bf16) * value(before.b[k][j], bf16);
      REQUIRE(m.d[i][j] == sum);
    }
  }
}

__global__ void all_halves(float* out, int first) {
  out[threadIdx.x] = float_of(Half::kF16, static_cast<std::uint32_t>(first) + threadIdx.x);
}

struct Tiles {
  std::uint16_t element[4][8][8];
};

__global__ void load_tiles(std::uint32_t* out, const Tiles* tiles, bool transposed) {
  SKVQ_SHARED(Tiles, shared);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) shared.element[lane / 8][lane % 8][i] = tiles->element[lane / 8][lane % 8][i];
  __syncwarp();
  std::uint32_t a[4];
  if (transposed) {
    ptx::load_matrices_transposed(a, shared.element[lane / 8][lane % 8]);
  } else {
    ptx::load_matrices(a, shared.element[lane / 8][lane % 8]);
  }
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = a[i];
}

__global__ void transpose(std::uint32_t* out) {
  // element (row, column) is row * 8 + column
  const std::uint32_t first = threadIdx.x / 4 * 8 + threadIdx.x % 4 * 2;
  out[threadIdx.x] = ptx::transpose_8x8(first | (first + 1) << 16);
}

}  // namespace

TEST_SUITE_BEGIN("matrices");

TEST_CASE("mma: products of halves summed in the order of k") {
  for (const bool bf16 : {false, true}) {
    for (unsigned seed = 0; seed < 20; ++seed) check_random_product(bf16, seed);
  }
}

TEST_CASE("every half is what the conversion of the project says") {
  std::vector<float> out(256);
  for (int first = 0; first < 0x10000; first += 256) {
    launch(all_halves, 1, 256, 0, out.data(), first);
    for (int i = 0; i < 256; ++i) {
      const float expected = skvq::half_to_float(static_cast<std::uint16_t>(first + i));
      if (!std::isnan(expected)) REQUIRE(skvq::float_bits(out[i]) == skvq::float_bits(expected));
      if (std::isnan(expected)) REQUIRE(std::isnan(out[i]));
    }
  }
}

TEST_CASE("ldmatrix, plain and transposed") {
  Tiles tiles;
  for (int m = 0; m < 4; ++m) {
    for (int i = 0; i < 64; ++i) tiles.element[m][i / 8][i % 8] = static_cast<std::uint16_t>(m * 100 + i);
  }
  for (const bool transposed : {false, true}) {
    std::vector<std::uint32_t> out(32 * 4);
    launch(load_tiles, 1, 32, 0, out.data(), &tiles, transposed);
    for (int i = 0; i < 128; ++i) {
      const int lane = i / 4, m = i % 4, row = lane / 4, column = lane % 4 * 2;
      const auto element = [&](int r, int c) {
        return std::uint32_t{tiles.element[m][transposed ? c : r][transposed ? r : c]};
      };
      REQUIRE(out[i] == (element(row, column) | element(row, column + 1) << 16));
    }
  }
}

TEST_CASE("movmatrix") {
  const std::vector<std::uint32_t> out = results(transpose, 1, 32);
  for (std::uint32_t lane = 0; lane < 32; ++lane) {
    const std::uint32_t row = lane / 4, column = lane % 4 * 2;
    REQUIRE(out[lane] == ((column * 8 + row) | ((column + 1) * 8 + row) << 16));
  }
}

TEST_CASE("ex2 flushes subnormal results") {
  CHECK(ex2(3.0f) == 8.0f);
  CHECK(ex2(-126.0f) == 0x1p-126f);
  CHECK(ex2(-126.5f) == 0.0f);
  CHECK(ex2(-INFINITY) == 0.0f);
  CHECK(ex2(INFINITY) == INFINITY);
  CHECK(std::isnan(ex2(NAN)));
}

TEST_SUITE_END();

}  // namespace simt::selftest

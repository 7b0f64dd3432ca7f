// Tensor cores and the moves of their operands: layouts as skvq::Mma and csrc/cuda/ptx.cuh have them, and operands that
// are subnormal, which the decode kernel feeds on purpose (csrc/cuda/operands.cuh).
#pragma once

#include <array>
#include <random>
#include <vector>

#include "gpu/check_numbers.h"
#include "skvq/arrangement.h"

namespace skvq::bench {

inline constexpr int kLanes = 32;

// One product d = a b + c as numbers, and as the lanes hold it.
struct Product {
  std::array<std::array<std::uint16_t, 16>, 16> a{};  // bits of fp16 or bf16
  std::array<std::array<std::uint16_t, 8>, 16> b{};
  std::array<std::array<float, 8>, 16> c{};

  // Four registers of A, two of B and four of C for each lane.
  Words words() const {
    Words w(kLanes * 10, 0);
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 16; ++column) {
        const Mma::Owner o = Mma::owner(row, column);
        w[o.lane * 10 + o.reg] |= std::uint32_t{a[row][column]} << 16 * o.half;
      }
      for (int column = 0; column < 8; ++column) {
        const int b_lane = column * 4 + row % 8 / 2;
        w[b_lane * 10 + 4 + row / 8] |= std::uint32_t{b[row][column]} << 16 * (row % 2);
        w[d_lane(row, column) * 10 + 6 + d_register(row, column)] = float_bits(c[row][column]);
      }
    }
    return w;
  }
  static int d_lane(int row, int column) { return row % 8 * 4 + column / 2; }
  static int d_register(int row, int column) { return row / 8 * 2 + column % 2; }
};

// A warp for each product: 10 words a lane in, 4 out.
template <bool Bf16>
__global__ void multiply(const std::uint32_t* in, float* out) {
  const std::uint32_t* w = in + (blockIdx.x * kLanes + threadIdx.x) * 10;
  const std::uint32_t a[4] = {w[0], w[1], w[2], w[3]};
  float d[4] = {bits_float(w[6]), bits_float(w[7]), bits_float(w[8]), bits_float(w[9])};
  if constexpr (Bf16) {
    cuda::ptx::mma_bf16(d, a, w[4], w[5]);
  } else {
    cuda::ptx::mma_f16(d, a, w[4], w[5]);
  }
  for (int i = 0; i < 4; ++i) out[(blockIdx.x * kLanes + threadIdx.x) * 4 + i] = d[i];
}

// Compares with sums in double; the numbers of all products here are such that every sum is exact in fp32.
template <bool Bf16>
void check_products(Findings& findings, const char* name, const std::vector<Product>& products) {
  Words in;
  for (const Product& p : products) {
    const Words w = p.words();
    in.insert(in.end(), w.begin(), w.end());
  }
  const DeviceBytes from(in), to(products.size() * kLanes * 4 * sizeof(float));
  to.fill(0xff);
  cuda::launch("multiply", multiply<Bf16>, {static_cast<std::int64_t>(products.size())}, kLanes, 0, nullptr,
               from.as<const std::uint32_t>(), to.as<float>());
  const std::vector<float> out = to.download<float>();
  const auto value = [](std::uint16_t bits) { return Bf16 ? bf16_to_float(bits) : half_to_float(bits); };
  Tally tally;
  double worst = 0.0;
  for (std::size_t i = 0; i < products.size(); ++i) {
    const Product& p = products[i];
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        double want = p.c[row][column];
        for (int k = 0; k < 16; ++k) want += double{value(p.a[row][k])} * value(p.b[k][column]);
        const float got = out[(i * kLanes + Product::d_lane(row, column)) * 4 + Product::d_register(row, column)];
        worst = std::fmax(worst, std::fabs(got - want));
        tally.check(got == want, "product ", i, " row ", row, " column ", column, " gave ", got, ", not ", want);
      }
    }
  }
  findings.add(name, tally.ok(), tally.text(), tally.figures().add("max_error", worst));
}

// Whole numbers from -8 to 8, all over the matrices.
template <bool Bf16>
std::vector<Product> small_integers(int count) {
  std::mt19937 generator(3);
  const auto number = [&] { return static_cast<float>(static_cast<int>(generator() % 17) - 8); };
  const auto bits = [](float x) { return Bf16 ? float_to_bf16(x) : float_to_half(x); };
  std::vector<Product> products(count);
  for (Product& p : products) {
    for (auto& row : p.a) {
      for (auto& x : row) x = bits(number());
    }
    for (auto& row : p.b) {
      for (auto& x : row) x = bits(number());
    }
    for (auto& row : p.c) {
      for (auto& x : row) x = number();
    }
  }
  return products;
}

// Every fp16 pattern of 0 to 2047 in A, once for each half of the columns and for two powers of two in B.
inline std::vector<Product> all_subnormals() {
  std::vector<Product> products;
  for (int first = 0; first < 2048; first += 256) {
    for (const int half : {0, 8}) {
      for (const float scale : {1.0f, 256.0f}) {
        Product p;
        for (int i = 0; i < 256; ++i) p.a[i / 16][i % 16] = static_cast<std::uint16_t>(first + i);
        for (int column = 0; column < 8; ++column) p.b[half + column][column] = float_to_half(scale);
        products.push_back(p);
      }
    }
  }
  return products;
}

// Codes of two bits in their fields, as the decode kernel has them, times whole numbers that undo the field.
inline std::vector<Product> codes_in_fields(int count) {
  std::mt19937 generator(4);
  std::vector<Product> products(count);
  for (std::size_t i = 0; i < products.size(); ++i) {
    const int bit = static_cast<int>(i % 5) * 2;
    for (auto& row : products[i].a) {
      for (auto& x : row) x = static_cast<std::uint16_t>(generator() % 4 << bit);
    }
    for (auto& row : products[i].b) {
      for (auto& x : row) {
        x = float_to_half(static_cast<float>(static_cast<int>(generator() % 65) - 32) * power_of_two(8 - bit));
      }
    }
    for (auto& row : products[i].c) {
      for (auto& x : row) x = static_cast<float>(static_cast<int>(generator() % 8192)) * 0x1p-16f;
    }
  }
  return products;
}

// What the lanes read back: transpose_8x8 of their own words, then load_matrices and load_matrices_transposed of the
// four 8 x 8 matrices that the words of all lanes make up, row l / 4 and columns 2 (l % 4) + {0, 1} in lane l.
[[maybe_unused]] static __global__ void move_matrices(const std::uint32_t* in, std::uint32_t* out) {
  SKVQ_DYNAMIC_SHARED(shared);
  const int lane = cuda::lane_index();
  std::uint32_t* rows = reinterpret_cast<std::uint32_t*>(shared);  // matrix, row, four words
  for (int m = 0; m < 4; ++m) rows[m * 32 + lane] = in[m * 32 + lane];
  __syncwarp();
  std::uint32_t plain[4], transposed[4];
  cuda::ptx::load_matrices(plain, rows + lane * 4);
  cuda::ptx::load_matrices_transposed(transposed, rows + lane * 4);
  for (int m = 0; m < 4; ++m) {
    out[m * 32 + lane] = cuda::ptx::transpose_8x8(in[m * 32 + lane]);
    out[128 + m * 32 + lane] = plain[m];
    out[256 + m * 32 + lane] = transposed[m];
  }
}

inline void check_moves(Findings& findings) {
  Words in(128);
  const auto element = [](int matrix, int row, int column) { return matrix * 64u + row * 8u + column + 1u; };
  const auto word = [&](int matrix, int row, int column, bool transposed) {
    return transposed ? element(matrix, column, row) | element(matrix, column + 1, row) << 16
                      : element(matrix, row, column) | element(matrix, row, column + 1) << 16;
  };
  for (int i = 0; i < 128; ++i) in[i] = word(i / 32, i % 32 / 4, i % 4 * 2, false);
  const DeviceBytes from(in), to(3 * in.size() * 4);
  to.fill(0xff);
  cuda::launch("move_matrices", move_matrices, {1}, kLanes, 512, nullptr, from.as<const std::uint32_t>(),
               to.as<std::uint32_t>());
  const Words out = to.download<std::uint32_t>();
  const char* names[] = {"movmatrix transposes", "ldmatrix x4", "ldmatrix x4 trans"};
  for (int move = 0; move < 3; ++move) {
    Tally tally;
    for (int i = 0; i < 128; ++i) {
      const std::uint32_t want = word(i / 32, i % 32 / 4, i % 4 * 2, move != 1), got = out[move * 128 + i];
      tally.check(got == want, "matrix ", i / 32, " lane ", i % 32, " holds ", got, ", not ", want);
    }
    findings.add(names[move], tally.ok(), tally.text(), tally.figures());
  }
}

inline void check_matrices(Findings& findings) {
  check_products<false>(findings, "mma fp16, layout of A, B and D", small_integers<false>(64));
  check_products<true>(findings, "mma bf16, layout of A, B and D", small_integers<true>(64));
  check_products<false>(findings, "mma, subnormal A: every pattern to 2047", all_subnormals());
  check_products<false>(findings, "mma, subnormal A: sums of codes in fields", codes_in_fields(320));
  check_moves(findings);
}

}  // namespace skvq::bench

// E4M3, fp16 and bf16 against their definitions, evaluated in double and searched for the nearest value.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "core/minifloat.h"
#include "third_party/doctest.h"

namespace skvq {
namespace {

// Value of a non-negative code with the given exponent and mantissa widths, from the definition.
double decode(std::uint32_t code, int mantissa_bits, int bias) {
  const int exponent = static_cast<int>(code >> mantissa_bits);
  const double fraction = std::ldexp(static_cast<double>(code & ((1u << mantissa_bits) - 1)), -mantissa_bits);
  return exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias);
}

// Format with codes 0..max for the finite non-negative values, in increasing order.
struct Definition {
  int mantissa_bits, bias;
  std::uint32_t max, sign, above_max;  // above_max: code of what rounds beyond the largest value

  double value(std::uint32_t code) const { return decode(code, mantissa_bits, bias); }

  // Nearest code, ties to the even one, by bisection over all values.
  std::uint32_t nearest(double x) const {
    std::uint32_t low = 0, high = max + 1;  // max + 1 stands for the next value there would be
    const double a = std::fabs(x);
    while (high - low > 1) {
      const std::uint32_t middle = (low + high) / 2;
      (value(middle) <= a ? low : high) = middle;
    }
    const double below = a - value(low), above = value(high) - a;
    std::uint32_t code = below < above || (below == above && low % 2 == 0) ? low : high;
    if (code > max) code = above_max;
    return code | (std::signbit(x) ? sign : 0u);
  }
};

constexpr Definition kE4m3{3, 7, 0x7e, 0x80, 0x7e};
constexpr Definition kHalf{10, 15, 0x7bff, 0x8000, 0x7c00};
constexpr Definition kBf16{7, 127, 0x7f7f, 0x8000, 0x7f80};

// Every value, every tie and their neighbours in fp32, both signs.
std::vector<float> boundary_values(const Definition& d) {
  std::vector<float> values;
  const float infinity = std::numeric_limits<float>::infinity();
  for (std::uint32_t code = 0; code <= d.max; ++code) {
    for (const double exact : {d.value(code), 0.5 * (d.value(code) + d.value(code + 1))}) {
      const float x = static_cast<float>(exact);
      for (const float y : {x, std::nextafter(x, infinity), std::nextafter(x, -infinity)}) {
        values.push_back(y);
        values.push_back(-y);
      }
    }
  }
  return values;
}

std::vector<float> random_bit_patterns(int count) {
  std::mt19937 generator(1);
  std::vector<float> values;
  while (static_cast<int>(values.size()) < count) {
    const float x = bits_float(generator());
    if (std::isfinite(x)) values.push_back(x);
  }
  return values;
}

template <class Convert>
void check_rounding(const Definition& d, Convert&& convert) {
  for (const auto& values : {boundary_values(d), random_bit_patterns(200000)}) {
    for (const float x : values) {
      const std::uint32_t found = convert(x), expected = d.nearest(x);
      if (found == expected) continue;
      FAIL("x = " << x << " gives " << found << ", nearest is " << expected);
    }
  }
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST_SUITE_BEGIN("minifloat");

TEST_CASE("all E4M3 bytes mean what the standard says and round-trip") {
  for (int byte = 0; byte < 256; ++byte) {
    const float x = e4m3_to_float(static_cast<std::uint8_t>(byte));
    CAPTURE(byte);
    if ((byte & 0x7f) == 0x7f) {
      CHECK(std::isnan(x));
      CHECK((float_to_e4m3(x) & 0x7f) == 0x7f);
      continue;
    }
    CHECK(static_cast<double>(x) == (byte & 0x80 ? -1 : 1) * kE4m3.value(byte & 0x7f));
    CHECK(float_to_e4m3(x) == byte);
  }
}

TEST_CASE("all halves mean what the standard says and round-trip") {
  for (std::uint32_t code = 0; code < 65536; ++code) {
    const float x = half_to_float(static_cast<std::uint16_t>(code));
    const std::uint32_t magnitude = code & 0x7fff;
    const std::uint16_t back = float_to_half(x);
    bool ok = true;
    if (magnitude > 0x7c00) {
      ok = std::isnan(x) && (back & 0x7fff) > 0x7c00;
    } else {
      const double value = magnitude == 0x7c00 ? static_cast<double>(kInfinity) : kHalf.value(magnitude);
      ok = static_cast<double>(x) == (code & 0x8000 ? -value : value) && back == code;
    }
    if (!ok) FAIL("half " << code << " reads as " << x << " and comes back as " << back);
  }
}

TEST_CASE("all bf16 round-trip") {
  for (std::uint32_t code = 0; code < 65536; ++code) {
    const float x = bf16_to_float(static_cast<std::uint16_t>(code));
    const std::uint16_t back = float_to_bf16(x);
    const bool ok = (code & 0x7fff) > 0x7f80 ? std::isnan(x) && (back & 0x7fff) > 0x7f80 : back == code;
    if (!ok) FAIL("bf16 " << code << " reads as " << x << " and comes back as " << back);
  }
}

TEST_CASE("E4M3 rounds to the nearest value with ties to even and saturates") {
  check_rounding(kE4m3, float_to_e4m3);
}
TEST_CASE("fp16 rounds to the nearest value with ties to even") {
  check_rounding(kHalf, float_to_half);
}
TEST_CASE("bf16 rounds to the nearest value with ties to even") {
  check_rounding(kBf16, float_to_bf16);
}

TEST_CASE("infinities and NaN") {
  CHECK(float_to_e4m3(kInfinity) == 0x7e);
  CHECK(float_to_e4m3(-kInfinity) == 0xfe);
  CHECK(float_to_half(kInfinity) == 0x7c00);
  CHECK(float_to_half(-kInfinity) == 0xfc00);
  CHECK(float_to_bf16(kInfinity) == 0x7f80);
  CHECK(float_to_bf16(-kInfinity) == 0xff80);
  for (const std::uint32_t bits : {0x7fc00000u, 0x7f800001u, 0xffffffffu, 0xff800001u, 0x7f80ffffu}) {
    CAPTURE(bits);
    const float nan = bits_float(bits);
    CHECK(std::isnan(e4m3_to_float(float_to_e4m3(nan))));
    CHECK(std::isnan(half_to_float(float_to_half(nan))));
    CHECK(std::isnan(bf16_to_float(float_to_bf16(nan))));
  }
}

TEST_CASE("zeros keep their sign") {
  CHECK(float_to_e4m3(-0.0f) == 0x80);
  CHECK(float_to_half(-0.0f) == 0x8000);
  CHECK(float_to_bf16(-0.0f) == 0x8000);
  CHECK(std::signbit(e4m3_to_float(0x80)));
  CHECK(std::signbit(half_to_float(0x8000)));
}

TEST_CASE("powers of two are exact over the range that is used") {
  for (int exponent = -126; exponent <= 127; ++exponent) {
    REQUIRE(static_cast<double>(power_of_two(exponent)) == std::ldexp(1.0, exponent));
  }
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

// The quantizer of one group.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/quantize.h"
#include "support/formats.h"
#include "third_party/doctest.h"

namespace skvq {
namespace {

constexpr Exponents kNoExponents{0, 0};
constexpr Meta kMetas[] = {Meta::kE4m3, Meta::kFp16};

// Relative and absolute error of storing a scale or zero in `meta`.
double relative_error(Meta meta) {
  return meta == Meta::kE4m3 ? 0x1p-4 : 0x1p-11;
}
double absolute_error(Meta meta) {
  return meta == Meta::kE4m3 ? 0x1p-10 : 0x1p-25;
}

struct Quantized {
  GroupQuantizer quantizer;
  std::vector<float> decoded;
};

Quantized quantize_group(const std::vector<float>& x, int levels, Meta meta, float clip = 1.0f,
                         Exponents e = kNoExponents) {
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  Quantized q{make_group_quantizer(*low, *high, true, clip, levels, meta, e), {}};
  for (const float f : x) {
    const int code = quantize(f, q.quantizer, levels);
    REQUIRE(code >= 0);
    REQUIRE(code < levels);
    q.decoded.push_back(static_cast<float>(code) * q.quantizer.scale + q.quantizer.zero);
  }
  return q;
}

double largest_error(const std::vector<float>& x, const Quantized& q) {
  double error = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    error = std::max(error, std::fabs(static_cast<double>(x[i]) - static_cast<double>(q.decoded[i])));
  }
  return error;
}

// Half a step, plus what the range loses at its ends: the rounding of the zero and `levels - 1` times that of the
// scale.
double error_bound(const std::vector<float>& x, int levels, Meta meta, Exponents e = kNoExponents) {
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  const double zero_error = std::max(std::fabs(*low) * relative_error(meta), std::ldexp(absolute_error(meta), e.zero));
  const double step = (static_cast<double>(*high) - static_cast<double>(*low) + zero_error) / (levels - 1);
  // A scale of zero is raised to the smallest positive value, which is twice the absolute error.
  const double scale_error = std::max(step * relative_error(meta), std::ldexp(2 * absolute_error(meta), e.scale));
  return 0.5 * (step + scale_error) + std::max(zero_error, (levels - 1) * scale_error) + 1e-6 * std::fabs(*high);
}

TEST_SUITE_BEGIN("quantize");

TEST_CASE("codes are the nearest level") {
  for (const CodeTraits& t : kCodes) {
    for (const Meta meta : kMetas) {
      const auto x = test::random_floats(512, 3);
      const Quantized q = quantize_group(x, t.levels, meta);
      for (std::size_t i = 0; i < x.size(); ++i) {
        double best = std::numeric_limits<double>::infinity();
        for (int level = 0; level < t.levels; ++level) {
          best = std::min(best, std::fabs(static_cast<double>(level) * q.quantizer.scale + q.quantizer.zero - x[i]));
        }
        REQUIRE(std::fabs(static_cast<double>(q.decoded[i]) - x[i]) <= best + 1e-6);
      }
    }
  }
}

TEST_CASE("the error is bounded by half a step and the rounding of scale and zero") {
  for (const CodeTraits& t : kCodes) {
    for (const Meta meta : kMetas) {
      for (unsigned seed = 0; seed < 200; ++seed) {
        auto x = test::random_floats(32, seed);
        const float centre = static_cast<float>(static_cast<int>(seed % 7) - 3);
        for (float& f : x) f = f * std::ldexp(1.0f, static_cast<int>(seed % 5) - 2) + centre;
        const Quantized q = quantize_group(x, t.levels, meta);
        CAPTURE(t.name);
        CAPTURE(seed);
        CHECK(largest_error(x, q) <= error_bound(x, t.levels, meta));
      }
    }
  }
}

TEST_CASE("the levels reach the top of the range wherever the zero was rounded to") {
  for (const float low : {-1.06f, -1.19f, 2.1f, -300.0f}) {
    for (const Meta meta : kMetas) {
      const GroupQuantizer g = make_group_quantizer(low, low + 1.0f, true, 1.0f, 4, meta, kNoExponents);
      const double step = (static_cast<double>(low) + 1.0 - g.zero) / 3.0;
      CAPTURE(low);
      CHECK(std::fabs(g.scale - std::max(0.0, step)) <=
            std::max(step * relative_error(meta), 2 * absolute_error(meta)) + 1e-6);
    }
  }
}

TEST_CASE("exponents shift the range without changing codes") {
  const auto x = test::random_floats(64, 5);
  for (const int exponent : {-20, -3, 4, 30}) {
    auto shifted = x;
    for (float& f : shifted) f = std::ldexp(f, exponent);
    const Quantized plain = quantize_group(x, 4, Meta::kE4m3);
    const Quantized moved = quantize_group(shifted, 4, Meta::kE4m3, 1.0f, {exponent, exponent});
    CHECK(plain.quantizer.scale_bits == moved.quantizer.scale_bits);
    CHECK(plain.quantizer.zero_bits == moved.quantizer.zero_bits);
    for (std::size_t i = 0; i < x.size(); ++i) REQUIRE(std::ldexp(plain.decoded[i], exponent) == moved.decoded[i]);
  }
}

TEST_CASE("a constant group keeps its value up to the rounding of its zero") {
  for (const CodeTraits& t : kCodes) {
    for (const Meta meta : kMetas) {
      for (const float value : {0.0f, 1.0f, -1.0f, 0.3f, -0.3f, 17.3f, -300.0f, 1e-4f}) {
        const std::vector<float> x(32, value);
        CAPTURE(t.name);
        CAPTURE(value);
        CHECK(largest_error(x, quantize_group(x, t.levels, meta)) <= error_bound(x, t.levels, meta));
      }
    }
  }
  const std::vector<float> zeros(32, 0.0f);
  CHECK(largest_error(zeros, quantize_group(zeros, 4, Meta::kE4m3)) == 0.0);
}

TEST_CASE("a group on one side of zero keeps its range, also when clipped") {
  for (const float sign : {1.0f, -1.0f}) {
    std::vector<float> x;
    for (int i = 0; i <= 32; ++i) x.push_back(sign * (5.0f + static_cast<float>(i) / 32.0f));
    for (const CodeTraits& t : kCodes) {
      CAPTURE(t.name);
      CHECK(largest_error(x, quantize_group(x, t.levels, Meta::kFp16)) <= error_bound(x, t.levels, Meta::kFp16));
      // The clip shrinks about the midpoint 5.5, not towards zero.
      const Quantized q = quantize_group(x, t.levels, Meta::kFp16, 0.5f);
      CHECK(q.quantizer.zero == doctest::Approx(sign > 0 ? 5.25 : -5.75).epsilon(1e-3));
      CHECK(q.quantizer.scale * static_cast<float>(t.levels - 1) == doctest::Approx(0.5).epsilon(5e-3));
    }
  }
}

TEST_CASE("huge values saturate E4M3 and stay finite") {
  const std::vector<float> x = {-1e30f, -1.0f, 0.0f, 2.0f, 1e30f};
  for (const CodeTraits& t : kCodes) {
    const Quantized q = quantize_group(x, t.levels, Meta::kE4m3);
    CHECK(q.quantizer.zero == -448.0f);
    CHECK(q.quantizer.scale == 448.0f);
    for (const float f : q.decoded) CHECK(std::isfinite(f));
  }
  const float huge = 0x1p100f;
  const std::vector<float> fitting = {-huge, huge};
  const Quantized q = quantize_group(fitting, 4, Meta::kE4m3, 1.0f, {100, 100});
  CHECK(largest_error(fitting, q) <= error_bound(fitting, 4, Meta::kE4m3, {100, 100}));
}

TEST_CASE("a scale is never zero") {
  for (const Meta meta : kMetas) {
    for (const float high : {0.0f, 1e-45f, 1e-30f, 1e-8f, 1e-3f}) {
      const GroupQuantizer g = make_group_quantizer(0.0f, high, true, 1.0f, 4, meta, kNoExponents);
      CAPTURE(high);
      CHECK(g.scale_bits != 0);
      CHECK(g.scale > 0.0f);
      CHECK(std::isfinite(g.inverse));
    }
  }
}

TEST_CASE("a group that is not finite reads back as NaN") {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const Meta meta : kMetas) {
    for (const float high : {1.0f, infinity, quiet_nan()}) {
      const GroupQuantizer g = make_group_quantizer(-1.0f, high, false, 1.0f, 4, meta, kNoExponents);
      CHECK(std::isnan(decode_meta(meta, g.scale_bits)));
      CHECK(std::isnan(decode_meta(meta, g.zero_bits)));
      for (const float x : {-1.0f, 1.0f, infinity, -infinity, quiet_nan()}) {
        const int code = quantize(x, g, 4);
        CHECK(code >= 0);
        CHECK(code < 4);
        CHECK(std::isnan(static_cast<float>(code) * g.scale + g.zero));
      }
    }
  }
}

TEST_CASE("codes round half to even") {
  const GroupQuantizer g{0.0f, 1.0f, 1.0f, 0, 0};
  CHECK(quantize(0.5f, g, 256) == 0);
  CHECK(quantize(1.5f, g, 256) == 2);
  CHECK(quantize(2.5f, g, 256) == 2);
  CHECK(quantize(254.5f, g, 256) == 254);
  CHECK(quantize(1e9f, g, 256) == 255);
  CHECK(quantize(-1e9f, g, 256) == 0);
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

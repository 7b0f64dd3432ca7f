// Partial softmax states and their merging.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/softmax.h"
#include "cpu/cpu.h"
#include "support/formats.h"
#include "third_party/doctest.h"

namespace skvq {
namespace {

// State of a run of logits, and of one value per logit.
struct Partial {
  SoftmaxState state;
  float o;
};

Partial partial(const std::vector<float>& logits, const std::vector<float>& values, std::size_t begin,
                std::size_t end) {
  Partial p{empty_state(), 0.0f};
  for (std::size_t i = begin; i < end; ++i) p.state.max = std::max(p.state.max, logits[i]);
  for (std::size_t i = begin; i < end; ++i) {
    const float e = std::exp(logits[i] - p.state.max);
    p.state.sum += e;
    p.o += e * values[i];
  }
  return p;
}

Partial merged(const Partial& a, const Partial& b) {
  const MergeWeights w = merge(a.state, b.state);
  return {w.merged, a.o * w.a + b.o * w.b};
}

void check_equal(const Partial& a, const Partial& b) {
  CHECK(log_sum_exp(a.state) == doctest::Approx(log_sum_exp(b.state)).epsilon(1e-5));
  CHECK(a.o * normalizer(a.state) == doctest::Approx(b.o * normalizer(b.state)).epsilon(1e-5));
}

TEST_SUITE_BEGIN("softmax");

TEST_CASE("parts merge in any grouping to the softmax of the whole") {
  for (const float spread : {1.0f, 30.0f}) {
    auto logits = test::random_floats(90, 1);
    for (float& l : logits) l *= spread;
    const auto values = test::random_floats(90, 2);
    const Partial whole = partial(logits, values, 0, 90);
    const Partial a = partial(logits, values, 0, 10), b = partial(logits, values, 10, 80),
                  c = partial(logits, values, 80, 90);
    check_equal(merged(merged(a, b), c), whole);
    check_equal(merged(a, merged(b, c)), whole);
    check_equal(merged(merged(c, a), b), whole);
  }
}

TEST_CASE("an empty state changes nothing") {
  const SoftmaxState some{3.0f, 2.0f};
  for (const MergeWeights& w : {merge(some, empty_state()), merge(empty_state(), some)}) {
    CHECK(w.merged.max == some.max);
    CHECK(w.merged.sum == some.sum);
    CHECK(w.a + w.b == 1.0f);
  }
}

TEST_CASE("two empty states are an empty state") {
  const MergeWeights w = merge(empty_state(), empty_state());
  CHECK(w.a == 0.0f);
  CHECK(w.b == 0.0f);
  CHECK(log_sum_exp(w.merged) == minus_infinity());
  CHECK(normalizer(w.merged) == 0.0f);
}

TEST_CASE("logits far apart neither overflow nor vanish") {
  const MergeWeights w = merge({1e30f, 1.0f}, {-1e30f, 1.0f});
  CHECK(w.a == 1.0f);
  CHECK(w.b == 0.0f);
  CHECK(w.merged.sum == 1.0f);
  CHECK(log_sum_exp(w.merged) == 1e30f);
  CHECK(log_sum_exp(merge({-200.0f, 1.0f}, {-200.0f, 1.0f}).merged) == doctest::Approx(-200.0 + std::log(2.0)));
}

TEST_CASE("merge_states combines two results of the same queries") {
  const float none = minus_infinity();
  const std::vector<float> lse_a = {0.5f, none, 1.0f, none}, lse_b = {1.5f, -2.0f, none, none};
  const std::vector<float> a = {1, 2, 0, 0, 5, 6, 0, 0}, b = {3, 4, 7, 8, 0, 0, 0, 0};
  std::vector<float> out(8, -1.0f), lse(4, -1.0f);
  cpu::merge_states({a.data(), b.data(), lse_a.data(), lse_b.data(), out.data(), lse.data(), 4, 2, DType::kF32},
                    cpu::kSerial);
  const double wa = 1.0 / (1.0 + std::exp(1.0)), wb = 1.0 - wa;
  const double expected[] = {wa * 1 + wb * 3, wa * 2 + wb * 4, 7, 8, 5, 6, 0, 0};
  for (int i = 0; i < 8; ++i) CHECK(out[i] == doctest::Approx(expected[i]).epsilon(1e-6));
  CHECK(lse[0] == doctest::Approx(std::log(std::exp(0.5) + std::exp(1.5))));
  CHECK(lse[1] == -2.0f);
  CHECK(lse[2] == 1.0f);
  CHECK(lse[3] == none);
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

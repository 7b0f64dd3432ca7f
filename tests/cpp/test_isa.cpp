// The kernels of every instruction set that this CPU runs or emulates, against the portable ones.
#include <cmath>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "support/cache.h"
#include "third_party/doctest.h"

namespace skvq::cpu {

#if defined(__x86_64__)
namespace emulated_avx512 {  // tests/cpp/emulation/avx512.h
PackKernels pack_kernels();
AttendKernels attend_kernels();
}  // namespace emulated_avx512
#endif

namespace {

using test::Cache;
using test::CacheShape;
using test::Queries;
using test::Tokens;

Kernels portable_kernels() {
  return supported_kernels().back();
}

std::vector<Kernels> other_kernels() {
  std::vector<Kernels> sets = supported_kernels();
  sets.pop_back();
#if defined(__x86_64__)
  if (!sets.empty()) {  // the emulation needs AVX2
    sets.push_back({"emulated_avx512", emulated_avx512::pack_kernels(), emulated_avx512::attend_kernels()});
  }
#endif
  return sets;
}

// Appends to a fresh cache with the kernels of one set.
void append_with(const PackKernels& pack, Cache& cache, const Tokens& tokens) {
  const AppendArgs args = cache.append_args(tokens, 0, tokens.count);
  for (int head = 0; head < cache.shape.num_kv_heads; ++head) {
    for (int tile = 0; tile < packed_tiles(tokens.count, cache.shape.num_sinks, cache.shape.window); ++tile) {
      pack.flush_tile(args, 0, head, tile);
    }
    pack.store_rows(args, 0, head);
  }
  cache.kv_len[0] = tokens.count;
}

// Normalized outputs and logarithms of sums of all rows of all heads, one work item per head.
std::vector<float> attend_with(const AttendKernels& attend, const Queries& queries) {
  const DecodeArgs& a = queries.args;
  const CacheView& c = a.cache;
  const int rows = static_cast<int>(a.queries.num_tokens) * (a.num_q_heads / c.num_kv_heads);
  std::vector<float> partial(rows * c.head_dim), results;
  std::vector<SoftmaxState> states(rows);
  for (int head = 0; head < c.num_kv_heads; ++head) {
    const WorkItem item{
        0, head, 0, rows, true, 0, packed_tiles(c.kv_len[0], c.num_sinks, c.window), partial.data(), states.data()};
    attend.attend_item(a, item, scratch_for(c, attend.tile_bytes));
    for (int row = 0; row < rows; ++row) {
      results.push_back(log_sum_exp(states[row]));
      for (int ch = 0; ch < c.head_dim; ++ch)
        results.push_back(partial[row * c.head_dim + ch] * normalizer(states[row]));
    }
  }
  return results;
}

void check_close(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  float largest = 0.0f;
  for (std::size_t i = 0; i < a.size(); ++i)
    largest = std::max(largest, std::fabs(a[i] - b[i]) / std::max(1.0f, std::fabs(b[i])));
  CHECK(largest <= 1e-5f);
}

// Root mean square of the difference over that of `want`.
float relative_error(const std::vector<float>& got, const std::vector<float>& want) {
  double difference = 0.0, size = 0.0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  return static_cast<float>(std::sqrt(difference / size));
}

template <class Check>
void each_shape(Check&& check) {
  for (const char* format : test::kSampleFormats) {
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBf16}) {
      for (const int head_dim : {64, 128}) {
        CacheShape shape;
        shape.k = shape.v = format;
        shape.group = head_dim == 64 ? 32 : 128;
        shape.meta = dtype == DType::kF16 ? "fp16" : "fp8";
        shape.dtype = dtype;
        shape.head_dim = head_dim;
        CAPTURE(format);
        CAPTURE(head_dim);
        CAPTURE(dtype_bytes(dtype));
        check(shape);
      }
    }
  }
}

// What became of rows that were quantized and read back.
struct RoundTrip {
  std::vector<std::uint8_t> codes;
  std::vector<std::uint16_t> meta;
  std::vector<float> decoded;
};

RoundTrip round_trip(const PackKernels& pack, int rows, int groups, const std::vector<float>& x) {
  const int channels = static_cast<int>(x.size()) / rows;
  const std::vector<float> clip(groups, 0.93f);
  std::vector<std::int32_t> group_start;
  for (int g = 0; g <= groups; ++g) group_start.push_back(g * channels / groups);
  RoundTrip result{std::vector<std::uint8_t>(rows * groups), std::vector<std::uint16_t>(rows * groups * 2),
                   std::vector<float>(x.size())};
  QuantizeRowsArgs a{};
  a.x = x.data();
  a.num_rows = rows;
  a.num_channels = channels;
  a.num_groups = a.row_bytes = groups;
  a.group_start = group_start.data();
  a.clip = {clip.data()};
  a.code = Code::kInt4;
  a.meta_type = Meta::kFp16;
  a.codes = result.codes.data();
  a.meta = result.meta.data();
  a.decoded = result.decoded.data();
  pack.quantize_rows(a, 0, rows);
  pack.dequantize_rows(a, 0, rows);
  return result;
}

TEST_SUITE_BEGIN("isa");

TEST_CASE("append writes the same bytes with every instruction set") {
  for (const Kernels& set : other_kernels()) {
    CAPTURE(set.isa);
    each_shape([&](const CacheShape& shape) {
      const Tokens tokens(shape, 250, 1);
      Cache expected(shape), found(shape);
      append_with(portable_kernels().pack, expected, tokens);
      append_with(set.pack, found, tokens);
      CHECK(expected.pages == found.pages);
      CHECK(expected.ring_k == found.ring_k);
      CHECK(expected.sink_v == found.sink_v);
    });
  }
}

// Thousands of clipped groups of two channels, a byte each: a product that one set fuses into the sum that follows,
// and another does not, shows in the last bit.
TEST_CASE("plain rows give the same bits with every instruction set") {
  const std::vector<float> x = test::random_floats(4096 * 64, 4);
  const RoundTrip expected = round_trip(portable_kernels().pack, 4096, 32, x);
  for (const Kernels& set : other_kernels()) {
    CAPTURE(set.isa);
    const RoundTrip found = round_trip(set.pack, 4096, 32, x);
    CHECK(expected.codes == found.codes);
    CHECK(expected.meta == found.meta);
    CHECK(expected.decoded == found.decoded);
  }
}

TEST_CASE("attention agrees within 1e-5 with every instruction set") {
  for (const Kernels& set : other_kernels()) {
    CAPTURE(set.isa);
    each_shape([&](const CacheShape& shape) {
      Cache cache(shape);
      cache.append(Tokens(shape, 250, 2));
      Queries queries(cache, 3, 5, 3);
      queries.args.softcap = shape.head_dim == 64 ? 20.0f : 0.0f;
      check_close(attend_with(set.attend, queries), attend_with(portable_kernels().attend, queries));
    });
  }
}

TEST_CASE("integer dot products add little with every instruction set that has them") {
  for (const Kernels& set : other_kernels()) {
    CAPTURE(set.isa);
    each_shape([&](const CacheShape& shape) {
      Cache cache(shape);
      cache.append(Tokens(shape, 250, 2));
      Queries queries(cache, 3, 5, 3);
      const std::vector<float> exact = attend_with(set.attend, queries);
      queries.args.exact = false;
      CHECK(relative_error(attend_with(set.attend, queries), exact) < 0.02f);
    });
  }
}

TEST_CASE("the chosen instruction set is one of the build") {
  CHECK(std::string(built_isas()).find(kernels().isa) != std::string::npos);
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq::cpu

// Append: how tokens arrive, on how many threads and in which arrangement changes nothing.
#include <cmath>
#include <cstring>
#include <vector>

#include "support/cache.h"
#include "third_party/doctest.h"

namespace skvq {
namespace {

using test::Bytes;
using test::Cache;
using test::CacheShape;
using test::Tokens;

// Appends one sequence's tokens in chunks, given in turn.
void append_in_chunks(Cache& cache, const Tokens& tokens, const std::vector<int>& chunks) {
  int first = 0;
  for (std::size_t i = 0; first < tokens.count; ++i) {
    const int count = std::min(chunks[i % chunks.size()], tokens.count - first);
    test::append(cache.append_args(tokens.only(first, count), first, count));
    first += count;
  }
}

void check_equal(const Cache& a, const Cache& b) {
  CHECK(a.kv_len == b.kv_len);
  CHECK(a.pages == b.pages);
  CHECK(a.sink_k == b.sink_k);
  CHECK(a.sink_v == b.sink_v);
  CHECK(a.ring_k == b.ring_k);
  CHECK(a.ring_v == b.ring_v);
}

std::vector<float> unpacked(const Cache& cache, Side side) {
  const CacheShape& s = cache.shape;
  const std::size_t n = static_cast<std::size_t>(cache.view.num_pages) * s.num_kv_heads * kTileTokens * s.head_dim;
  std::vector<float> k(n), v(n);
  cpu::unpack_pages({cache.pages.data(), cache.page_table.data(), cache.exponents.data(), cache.view.format,
                     static_cast<int>(cache.view.num_pages), s.num_kv_heads, k.data(), v.data()},
                    cpu::kSerial);
  return side == Side::kKey ? k : v;
}

// NaN equals itself here: pages that nobody wrote are full of it.
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST_SUITE_BEGIN("append");

TEST_CASE("any chunking gives the same bytes as one prefill") {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBf16}) {
    CacheShape shape;
    shape.dtype = dtype;
    shape.head_dim = 64;
    const Tokens tokens(shape, 300, 1);
    Cache whole(shape);
    whole.append(tokens);
    for (const std::vector<int>& chunks : {std::vector{1}, {7}, {64}, {130, 1, 40}, {3, 200}}) {
      CAPTURE(chunks[0]);
      Cache parts(shape);
      append_in_chunks(parts, tokens, chunks);
      check_equal(whole, parts);
    }
  }
}

TEST_CASE("tokens taken back and appended again give the same bytes") {
  const CacheShape shape;
  const Tokens tokens(shape, 300, 2), other(shape, 300, 3);
  Cache straight(shape);
  straight.append(tokens);
  for (const int at : {100, 101, 170, 229}) {
    Cache detour(shape);
    test::append(detour.append_args(tokens, 0, at));
    test::append(detour.append_args(other, at, shape.rollback));
    detour.kv_len[0] -= shape.rollback;
    test::append(detour.append_args(tokens.only(at, 300 - at), at, 300 - at));
    CAPTURE(at);
    check_equal(straight, detour);
  }
}

TEST_CASE("a sequence in a ragged batch gets the bytes it gets alone") {
  CacheShape shape;
  shape.batch = 3;
  CacheShape single = shape;
  single.batch = 1;
  const std::int32_t cu_seqlens[] = {0, 200, 200, 377};
  const Tokens tokens(shape, 377, 4);
  Cache batch(shape);
  batch.append(tokens, cu_seqlens);
  for (int b = 0; b < 3; ++b) {
    Cache alone(single);
    const int count = cu_seqlens[b + 1] - cu_seqlens[b];
    test::append(alone.append_args(tokens, cu_seqlens[b], count));
    CHECK(batch.kv_len[b] == alone.kv_len[0]);
    for (int tile = 0; tile < packed_tiles(count, shape.num_sinks, shape.window); ++tile) {
      const int bytes = shape.num_kv_heads * alone.view.format.record_bytes();
      const std::uint8_t* record = batch.view.record(b, tile, 0);
      CHECK(Bytes(record, record + bytes) ==
            Bytes(alone.view.record(0, tile, 0), alone.view.record(0, tile, 0) + bytes));
    }
  }
}

TEST_CASE("the arrangement does not change the values, in any format and head_dim") {
  for (const int head_dim : kHeadDims) {
    for (const std::string format : {"8", "4", "3", "2", "1.5", "1.5fast", "4:1/4+2"}) {
      CacheShape shape;
      shape.head_dim = head_dim;
      shape.num_kv_heads = 1;
      shape.max_pages = 1;
      shape.window = 0;
      shape.group = 32;
      shape.k = head_dim % 64 == 0 ? format : "2";
      shape.v = head_dim % 64 == 0 ? "3:1/2+1.5" : format[1] == ':' ? "2" : format;
      const Tokens tokens(shape, 70, 6);
      Cache fast(shape);
      shape.arrangement = "rows";
      Cache rows(shape);
      fast.append(tokens);
      cpu::append(rows.append_args(tokens, 0, tokens.count), cpu::kSerial);
      CAPTURE(head_dim);
      CAPTURE(format);
      CHECK(same_bits(unpacked(fast, Side::kKey), unpacked(rows, Side::kKey)));
      CHECK(same_bits(unpacked(fast, Side::kValue), unpacked(rows, Side::kValue)));
    }
  }
}

TEST_CASE("packed int8 values are close to what was appended") {
  CacheShape shape;
  shape.k = shape.v = "8";
  shape.meta = "fp16";
  shape.group = 32;
  shape.window = 0;
  shape.max_pages = 1;
  Tokens tokens(shape, shape.num_sinks + kTileTokens, 7);
  Cache cache(shape);
  cache.set_clips({1.0f}, {1.0f});
  cache.append(tokens);
  for (const Side side : kSides) {
    const std::vector<float> values = unpacked(cache, side);
    const Bytes& source = side == Side::kKey ? tokens.k : tokens.v;
    for (int t = 0; t < kTileTokens; ++t) {
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        for (int c = 0; c < shape.head_dim; ++c) {
          const int row = (shape.num_sinks + t) * shape.num_kv_heads + head;
          const float expected = load_float(shape.dtype, source.data(), row * shape.head_dim + c);
          REQUIRE(std::fabs(values[(head * kTileTokens + t) * shape.head_dim + c] - expected) < 0.03f);
        }
      }
    }
  }
}

TEST_CASE("of several clip ratios every token of a group takes the one that errs least") {
  for (const std::string format : {"2", "1.5"}) {
    CacheShape shape;
    shape.k = shape.v = format;
    shape.group = 32;
    shape.window = 0;
    shape.max_pages = 1;
    shape.dtype = DType::kF32;
    const Tokens tokens(shape, shape.num_sinks + kTileTokens, 9);
    const std::vector<float> ratios{0.9f, 0.6f, 0.75f};
    Cache searched(shape);
    searched.set_clips(ratios, ratios);
    searched.append(tokens);
    for (const Side side : kSides) {
      const Bytes& bytes = side == Side::kKey ? tokens.k : tokens.v;
      std::vector<float> x;  // as unpacked values lie
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        for (int t = 0; t < kTileTokens; ++t) {
          const std::int64_t row = (shape.num_sinks + t) * shape.num_kv_heads + head;
          for (int c = 0; c < shape.head_dim; ++c)
            x.push_back(load_float(shape.dtype, bytes.data(), row * shape.head_dim + c));
        }
      }
      std::vector<std::vector<float>> alone;
      for (const float ratio : ratios) {
        Cache cache(shape);
        cache.set_clips({ratio}, {ratio});
        cache.append(tokens);
        alone.push_back(unpacked(cache, side));
      }
      const std::vector<float> found = unpacked(searched, side);
      std::vector<int> taken(ratios.size(), 0);
      for (std::size_t first = 0; first < x.size(); first += shape.group) {
        const auto error = [&](const std::vector<float>& values) {
          double sum = 0;
          for (int c = 0; c < shape.group; ++c) sum += std::pow(double{values[first + c]} - x[first + c], 2);
          return sum;
        };
        double least = error(alone[0]);
        std::size_t best = 0;
        for (std::size_t r = 0; r < ratios.size(); ++r) {
          if (error(alone[r]) < least) least = error(alone[best = r]);
        }
        // Errors are counted in parts of the range, so that nearly equal ones may be taken for equal.
        CHECK(error(found) <= least * 1.001);
        ++taken[best];
      }
      for (const int count : taken) CHECK(count > 0);
    }
  }
}

TEST_CASE("a NaN stays in its group") {
  CacheShape shape;
  shape.group = 32;
  Tokens tokens(shape, 200, 8);
  Cache clean(shape), poisoned(shape);
  clean.append(tokens);
  const int token = 50, head = 1, channel = 70;
  store_float(shape.dtype, tokens.k.data(), (token * shape.num_kv_heads + head) * shape.head_dim + channel,
              quiet_nan());
  poisoned.append(tokens);
  const auto before = unpacked(clean, Side::kKey), after = unpacked(poisoned, Side::kKey);
  CHECK(same_bits(unpacked(clean, Side::kValue), unpacked(poisoned, Side::kValue)));
  const std::size_t row = (static_cast<std::size_t>(head) * kTileTokens + token - shape.num_sinks) * shape.head_dim;
  for (std::size_t i = 0; i < before.size(); ++i) {
    const bool in_group = i >= row + 64 && i < row + 96;
    if (in_group ? !std::isnan(after[i]) : before[i] != after[i] && !(std::isnan(before[i]) && std::isnan(after[i]))) {
      FAIL("value " << i << " was " << before[i] << " and is " << after[i]);
    }
  }
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

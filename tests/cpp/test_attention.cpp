// decode_attention against a plain softmax in double over what the cache holds.
#include <iterator>
#include <vector>

#include "core/softmax.h"
#include "support/attention.h"
#include "third_party/doctest.h"

namespace skvq {
namespace {

using test::Cache;
using test::CacheShape;
using test::largest_difference;
using test::Queries;
using test::Tokens;
using test::tolerance;

TEST_SUITE_BEGIN("attention");

TEST_CASE("every format and head_dim that there is a kernel for") {
  std::vector<const char*> arrangements(std::begin(kArrangementNames), std::end(kArrangementNames));
  if (test::kIsCuda) arrangements = {test::kArrangement};
  for (const char* arrangement : arrangements) {
    for (const test::DecodeFormat& format : test::decode_formats()) {
      CacheShape shape;
      shape.arrangement = arrangement;
      shape.head_dim = format.head_dim;
      shape.k = format.k;
      shape.v = format.v;
      shape.group = format.group;
      shape.num_kv_heads = 1;
      Cache cache(shape);
      cache.append(Tokens(shape, 180, 1));
      Queries queries(cache, 1, 3, 2);
      test::decode_attention(queries.args);
      CAPTURE(arrangement);
      CAPTURE(format.head_dim);
      CAPTURE(format.k);
      CAPTURE(format.v);
      CAPTURE(format.group);
      CHECK(largest_difference(cache, queries) < tolerance(shape.dtype));
    }
  }
}

TEST_CASE("every ratio of query to KV heads") {
  for (const int ratio : {1, 2, 4, 5, 7, 8, 71}) {
    CacheShape shape;
    shape.num_kv_heads = ratio == 71 ? 1 : 2;
    Cache cache(shape);
    cache.append(Tokens(shape, 200, 3));
    Queries queries(cache, 2, ratio, 4);
    test::decode_attention(queries.args);
    CAPTURE(ratio);
    CHECK(largest_difference(cache, queries) < tolerance(shape.dtype));
  }
}

TEST_CASE("every type of queries and rows") {
  for (const DType dtype : test::kDecodeDTypes) {
    CacheShape shape;
    shape.dtype = dtype;
    Cache cache(shape);
    cache.append(Tokens(shape, 200, 5));
    Queries queries(cache, 1, 4, 6);
    test::decode_attention(queries.args);
    CHECK(largest_difference(cache, queries) < tolerance(dtype));
  }
}

TEST_CASE("lengths around every border") {
  const CacheShape shape;
  const int tile_at = shape.num_sinks + shape.window + kTileTokens;
  for (const int len : {1, 4, 5, 6, shape.num_sinks + shape.window, tile_at - 1, tile_at, tile_at + 1, tile_at + 64}) {
    Cache cache(shape);
    cache.append(Tokens(shape, len, 7));
    Queries queries(cache, 1, 2, 8);
    test::decode_attention(queries.args);
    CAPTURE(len);
    CHECK(largest_difference(cache, queries) < tolerance(shape.dtype));
  }
}

TEST_CASE("several queries in one call see what single steps see") {
  const CacheShape shape;
  for (const int len : {40, 101, 102, 110, 165, 166, 300}) {
    for (const int count : {2, 3, shape.rollback + 1}) {
      Cache cache(shape);
      cache.append(Tokens(shape, len, 9));
      Queries queries(cache, count, 3, 10);
      test::decode_attention(queries.args);
      CAPTURE(len);
      CAPTURE(count);
      CHECK(largest_difference(cache, queries) < tolerance(shape.dtype));
    }
  }
}

TEST_CASE("ragged batch with an empty sequence") {
  CacheShape shape;
  shape.batch = 4;
  const std::int32_t lengths[] = {0, 150, 150, 157, 360}, query_starts[] = {0, 1, 1, 4, 9};
  Cache cache(shape);
  cache.append(Tokens(shape, 360, 11), lengths);
  Queries queries(cache, 9, 4, 12, query_starts);
  test::decode_attention(queries.args);
  CHECK(largest_difference(cache, queries) < tolerance(shape.dtype));
}

TEST_CASE("sliding window, softcap, learned sinks, logit shift and history only") {
  const CacheShape shape;
  Cache cache(shape);
  cache.append(Tokens(shape, 230, 13));
  const std::vector<float> sinks = test::random_floats(8, 14), shift = test::random_floats(16, 15);
  const auto check = [&](auto&& change) {
    Queries queries(cache, 2, 4, 16);
    change(queries.args);
    test::decode_attention(queries.args);
    CHECK(largest_difference(cache, queries) < tolerance(shape.dtype));
  };
  for (const int window : {1, 10, 64, 100, 1000}) check([&](DecodeArgs& a) { a.sliding_window = window; });
  check([&](DecodeArgs& a) { a.softcap = 2.0f; });
  check([&](DecodeArgs& a) { a.learned_sinks = sinks.data(); });
  check([&](DecodeArgs& a) { a.logit_shift = shift.data(); });
  check([&](DecodeArgs& a) { a.queries_in_cache = false; });
  check([&](DecodeArgs& a) {
    a.queries_in_cache = false;
    a.sliding_window = 40;
    a.softcap = 5.0f;
    a.learned_sinks = sinks.data();
    a.logit_shift = shift.data();
  });
}

TEST_CASE("queries that see nothing give zero and minus infinity") {
  const CacheShape shape;
  Cache cache(shape);
  Queries queries(cache, 2, 2, 17);
  queries.args.queries_in_cache = false;
  test::decode_attention(queries.args);
  for (const float lse : queries.lse) CHECK(lse == minus_infinity());
  for (const std::uint8_t byte : queries.out) REQUIRE(byte == 0);
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

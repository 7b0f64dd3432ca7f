// The decode kernels where they differ from the CPU backend: how work is cut, in which order it is done, what they
// refuse.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "simt/config.h"
#include "support/attention.h"

namespace skvq {
namespace {

using test::Bytes;
using test::Cache;
using test::CacheShape;
using test::largest_difference;
using test::Queries;
using test::Tokens;
using test::tolerance;

// Restores the configuration of the emulator at the end of a test.
class Configured {
 public:
  Configured() : before_(simt::config()) {}
  ~Configured() { simt::config() = before_; }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;

 private:
  simt::Config before_;
};

// Three sequences whose tiles keep every warp of several blocks busy for more than one round of its ring.
struct Long {
  static constexpr std::int32_t kLengths[] = {0, 1900, 1900 + 40, 1900 + 40 + 1200};
  static constexpr std::int32_t kQueries[] = {0, 1, 4, 5};

  static CacheShape shape(DType dtype) {
    CacheShape s;
    s.dtype = dtype;
    s.batch = 3;
    s.max_pages = 32;
    return s;
  }
  explicit Long(DType dtype = DType::kF16) : cache(shape(dtype)) {
    cache.append(Tokens(cache.shape, kLengths[3], 1), kLengths);
  }
  Queries queries(int ratio) const { return Queries(cache, kQueries[3], ratio, 2, kQueries); }

  Cache cache;
};

bool same_bits(const Queries& a, const Queries& b) {
  return a.out == b.out && std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * sizeof(float)) == 0;
}

TEST_SUITE_BEGIN("decode_kernels");

TEST_CASE("long sequences beside a short one") {
  for (const DType dtype : test::kDecodeDTypes) {
    const Long s(dtype);
    Queries queries = s.queries(4);
    test::decode_attention(queries.args);
    CAPTURE(static_cast<int>(dtype));
    CHECK(largest_difference(s.cache, queries) < tolerance(dtype));
  }
}

TEST_CASE("cut for devices of every size") {
  const Configured configured;
  const Long s;
  for (const int multiprocessors : {1, 2, 5, 40}) {
    simt::config().multiprocessors = multiprocessors;
    Queries queries = s.queries(2);
    test::decode_attention(queries.args);
    CAPTURE(multiprocessors);
    CHECK(largest_difference(s.cache, queries) < tolerance(DType::kF16));
  }
}

TEST_CASE("query rows of one, two and more warps") {
  const Long s;
  for (const int ratio : {1, 8, 9, 16, 33}) {
    Queries queries = s.queries(ratio);
    test::decode_attention(queries.args);
    CAPTURE(ratio);
    CHECK(largest_difference(s.cache, queries) < tolerance(DType::kF16));
  }
}

TEST_CASE("the same bits in whatever order threads run and copies arrive") {
  const Configured configured;
  const Long s;
  Queries first = s.queries(4);
  test::decode_attention(first.args);
  std::uint64_t seed = 1;
  for (const simt::Order order : {simt::Order::kReverse, simt::Order::kRandom, simt::Order::kWarpGreedy}) {
    for (const simt::Async async : {simt::Async::kLate, simt::Async::kEarly, simt::Async::kRandom}) {
      simt::config().order = order;
      simt::config().async = async;
      simt::config().seed = seed++;
      Queries again = s.queries(4);
      test::decode_attention(again.args);
      CAPTURE(simt::kOrderNames[static_cast<int>(order)]);
      CAPTURE(simt::kAsyncNames[static_cast<int>(async)]);
      CHECK(same_bits(first, again));
    }
  }
}

TEST_CASE("metadata as fp16") {
  CacheShape shape;
  shape.meta = "fp16";
  shape.max_pages = 16;
  Cache cache(shape);
  cache.append(Tokens(shape, 1000, 3));
  Queries queries(cache, 2, 4, 4);
  test::decode_attention(queries.args);
  CHECK(largest_difference(cache, queries) < tolerance(shape.dtype));
}

TEST_CASE("query rows that lie apart, with NaN between them") {
  const Long s;
  Queries queries = s.queries(4);
  const int heads = queries.args.num_q_heads, dim = s.cache.shape.head_dim;
  const std::int64_t head_stride = dim + 8, token_stride = heads * head_stride + 24;
  Bytes apart(static_cast<std::size_t>(Long::kQueries[3]) * token_stride * 2, test::kNothing);
  for (int row = 0; row < Long::kQueries[3] * heads; ++row) {
    const std::int64_t to = row / heads * token_stride + row % heads * head_stride;
    std::copy_n(queries.q.begin() + static_cast<std::ptrdiff_t>(row) * dim * 2, dim * 2, apart.begin() + to * 2);
  }
  test::decode_attention(queries.args);
  Queries other = s.queries(4);
  other.args.q = {apart.data(), token_stride, head_stride};
  test::decode_attention(other.args);
  CHECK(same_bits(queries, other));
}

TEST_CASE("a NaN in one query row stays there") {
  const Long s;
  Queries clean = s.queries(4), poisoned = s.queries(4);
  const int row = 13, dim = s.cache.shape.head_dim;
  store_float(DType::kF16, poisoned.q.data(), row * dim + 70, quiet_nan());
  test::decode_attention(clean.args);
  test::decode_attention(poisoned.args);
  for (int i = 0; i < static_cast<int>(clean.lse.size()); ++i) {
    CAPTURE(i);
    CHECK(std::isnan(poisoned.lse[i]) == (i == row));
    if (i == row) continue;
    CHECK(clean.lse[i] == poisoned.lse[i]);
    CHECK(std::memcmp(clean.out.data() + i * dim * 2, poisoned.out.data() + i * dim * 2, dim * 2) == 0);
  }
}

TEST_CASE("a page that is not there makes its own sequence NaN, and no other") {
  for (const std::int32_t page : {-1, 1 << 20}) {
    Long s;
    Queries clean = s.queries(2), lost = s.queries(2);
    test::decode_attention(clean.args);
    s.cache.page_table[2 * s.cache.shape.max_pages + 7] = page;
    test::decode_attention(lost.args);
    const int heads = lost.args.num_q_heads;
    for (int i = 0; i < static_cast<int>(lost.lse.size()); ++i) {
      CAPTURE(i);
      const bool hit = i / heads >= Long::kQueries[2];
      CHECK((hit ? std::isnan(lost.lse[i]) : lost.lse[i] == clean.lse[i]));
    }
  }
}

// One head of one sequence, and so many query rows that each warp of a block reads all of the block's tiles: more than
// the 32 whose pages it looks up at once.
struct ManyTiles {
  const Configured configured;
  CacheShape shape;

  ManyTiles() {
    simt::config().multiprocessors = 1;
    shape.num_kv_heads = 1;
    shape.max_pages = 120;
  }
};

TEST_CASE("more tiles for a warp than it looks up at once") {
  ManyTiles many;
  Cache cache(many.shape);
  cache.append(Tokens(many.shape, 7500, 6));
  Queries queries(cache, 1, 25, 7);
  test::decode_attention(queries.args);
  CHECK(largest_difference(cache, queries) < tolerance(many.shape.dtype));
}

TEST_CASE("a page that is not there is noticed wherever it stands in the table") {
  ManyTiles many;
  Cache cache(many.shape);
  cache.append(Tokens(many.shape, 7500, 6));
  for (const int tile : {0, 20, 33, 50, 70, 90, 110, 115}) {
    const std::int32_t page = cache.page_table[tile];
    cache.page_table[tile] = -1;
    Queries queries(cache, 1, 25, 7);
    test::decode_attention(queries.args);
    cache.page_table[tile] = page;
    CAPTURE(tile);
    CHECK(std::all_of(queries.lse.begin(), queries.lse.end(), [](float x) { return std::isnan(x); }));
  }
}

TEST_CASE("no queries, no sequences") {
  CacheShape shape;
  Cache cache(shape);
  Queries queries(cache, 0, 2, 5);
  test::decode_attention(queries.args);
  shape.batch = 0;
  Cache empty(shape);
  Queries none(empty, 0, 2, 5);
  test::decode_attention(none.args);
}

void check_refused(const CacheShape& shape, const std::string& part) {
  const Cache cache(shape);
  std::string message;
  try {
    cuda::check_decode_format(cache.view.format, shape.dtype, shape.dtype);
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  CAPTURE(message);
  CHECK(message.find(part) != std::string::npos);
}

TEST_CASE("what no kernel was built for is refused, with what was") {
  CacheShape shape;
  cuda::check_decode_format(Cache(shape).view.format, shape.dtype, shape.dtype);
  shape.dtype = DType::kF32;
  check_refused(shape, "the CUDA decode kernel takes float16 or bfloat16");
  shape.dtype = DType::kBf16;
  shape.arrangement = "lanes";
  check_refused(shape, "keep pages in the arrangement mma, and these are in lanes");
  shape.arrangement = "mma";
  shape.head_dim = 112;
  check_refused(shape, "no CUDA decode kernel was built for k2-v1.5-g128 at head_dim 112");
  check_refused(shape, "k2-v1.5-g128 at head_dim 128\n");
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

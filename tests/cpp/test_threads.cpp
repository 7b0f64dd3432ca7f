// The CPU backend on one, two and eight threads.
#include <vector>

#include "support/cache.h"
#include "support/threads.h"
#include "third_party/doctest.h"

namespace skvq {
namespace {

using test::Cache;
using test::CacheShape;
using test::Queries;
using test::Tokens;

TEST_SUITE_BEGIN("threads");

TEST_CASE("append: one, two and eight threads give the same bytes") {
  CacheShape shape;
  shape.k = "3:1/2+2";
  shape.num_kv_heads = 3;
  const Tokens tokens(shape, 400, 5);
  Cache serial(shape);
  cpu::append(serial.append_args(tokens, 0, tokens.count), cpu::kSerial);
  for (const cpu::Parallel& parallel : {test::kThreads<1>, test::kThreads<2>, test::kThreads<8>}) {
    Cache threaded(shape);
    cpu::append(threaded.append_args(tokens, 0, tokens.count), parallel);
    CHECK(serial.kv_len == threaded.kv_len);
    CHECK(serial.pages == threaded.pages);
    CHECK(serial.sink_k == threaded.sink_k);
    CHECK(serial.sink_v == threaded.sink_v);
    CHECK(serial.ring_k == threaded.ring_k);
    CHECK(serial.ring_v == threaded.ring_v);
  }
}

TEST_CASE("attention: one, two and eight threads give the same bits") {
  CacheShape shape;
  shape.num_kv_heads = 3;
  shape.batch = 2;
  shape.max_pages = 80;  // more tiles than one work item takes
  shape.head_dim = 64;
  const std::int32_t lengths[] = {0, 4800, 5000};
  Cache cache(shape);
  cache.append(Tokens(shape, 5000, 18), lengths);
  Queries serial(cache, 2, 4, 19);
  cpu::decode_attention(serial.args, cpu::kSerial);
  for (const cpu::Parallel& parallel : {test::kThreads<1>, test::kThreads<2>, test::kThreads<8>}) {
    Queries threaded(cache, 2, 4, 19);
    cpu::decode_attention(threaded.args, parallel);
    CHECK(serial.out == threaded.out);
    CHECK(serial.lse == threaded.lse);
  }
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

// The append kernels against the CPU backend, byte for byte.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/cache.h"
#include "third_party/doctest.h"

namespace skvq {
namespace {

using test::Bytes;
using test::Cache;
using test::CacheShape;
using test::Tokens;

// A cache of each backend, given the same calls.
struct Twins {
  Cache cpu, cuda;

  explicit Twins(const CacheShape& shape) : cpu(shape), cuda(shape) {}

  void append(const Tokens& tokens, int first, int count, const std::int32_t* cu_seqlens = nullptr) {
    cpu::append(cpu.append_args(tokens, first, count, cu_seqlens), cpu::kSerial);
    cuda::append(cuda.append_args(tokens, first, count, cu_seqlens), nullptr);
  }
  void append(const Tokens& tokens, const std::int32_t* cu_seqlens = nullptr) {
    append(tokens, 0, tokens.count, cu_seqlens);
  }
  void set_clips(const std::vector<float>& k, const std::vector<float>& v) {
    for (Cache* cache : {&cpu, &cuda}) cache->set_clips(k, v);
  }
  void check_equal() const {
    CHECK(cpu.kv_len == cuda.kv_len);
    CHECK(cpu.pages == cuda.pages);
    CHECK(cpu.sink_k == cuda.sink_k);
    CHECK(cpu.sink_v == cuda.sink_v);
    CHECK(cpu.ring_k == cuda.ring_k);
    CHECK(cpu.ring_v == cuda.ring_v);
  }
};

// One tile of one head.
CacheShape one_tile(int head_dim, const std::string& k, const std::string& v, int variant) {
  const std::vector<int> groups = test::groups_or_head();
  CacheShape shape;
  shape.k = k;
  shape.v = v;
  shape.head_dim = head_dim;
  shape.group = groups[variant % groups.size()];
  shape.meta = kMetaNames[variant / 4 % 2];
  shape.dtype = static_cast<DType>(variant % 3);
  shape.num_kv_heads = 1;
  shape.window = 0;
  shape.max_pages = 1;
  return shape;
}

void check_one_tile(const CacheShape& shape, unsigned seed) {
  CAPTURE(shape.k);
  CAPTURE(shape.v);
  CAPTURE(shape.head_dim);
  CAPTURE(shape.group);
  CAPTURE(shape.meta);
  CAPTURE(static_cast<int>(shape.dtype));
  Twins twins(shape);
  if (seed % 3 == 0) twins.set_clips({1.0f, 0.8f, 0.6f}, {0.9f, 1.0f, 0.5f});
  twins.append(Tokens(shape, shape.num_sinks + kTileTokens, seed));
  twins.check_equal();
}

TEST_SUITE_BEGIN("append_kernels");

TEST_CASE("every code in every head_dim, with every group, type of metadata and dtype") {
  int variant = 0;
  for (const int head_dim : kHeadDims) {
    for (const CodeTraits& k : kCodes) {
      for (int turn = 0; turn < 4; ++turn, ++variant) {
        const CodeTraits& v = kCodes[(static_cast<int>(k.code) + turn) % std::size(kCodes)];
        check_one_tile(one_tile(head_dim, k.name, v.name, variant), variant);
      }
    }
  }
}

TEST_CASE("every pair of bands at head_dim 64") {
  const std::vector<std::string> formats = test::tensor_formats(64);
  for (std::size_t i = 0; i < formats.size(); ++i) {
    check_one_tile(one_tile(64, formats[i], formats[i * 5 % formats.size()], static_cast<int>(i)), 3);
  }
}

TEST_CASE("trits of every number of channels") {
  for (int units = 1; units < kMaxHeadDim / kBandUnit; ++units) {
    const std::string split = concat(units, "/", kMaxHeadDim / kBandUnit);
    check_one_tile(one_tile(kMaxHeadDim, concat("1.5:", split, "+1.5"), concat("3:", split, "+1.5"), units), 4);
  }
}

TEST_CASE("any chunking, in calls of every size") {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBf16}) {
    CacheShape shape;
    shape.dtype = dtype;
    shape.head_dim = 64;
    const Tokens tokens(shape, 300, 1);
    for (const std::vector<int>& chunks : {std::vector{300}, {1}, {8}, {9}, {64}, {130, 1, 40}, {3, 200}}) {
      CAPTURE(chunks[0]);
      Twins twins(shape);
      int first = 0;
      for (std::size_t i = 0; first < tokens.count; ++i) {
        const int count = std::min(chunks[i % chunks.size()], tokens.count - first);
        twins.append(tokens.only(first, count), first, count);
        first += count;
      }
      twins.check_equal();
    }
  }
}

TEST_CASE("rows that take the place of rows which a tile needs") {
  for (const int chunk : {8, 40, 200}) {
    CacheShape shape;
    shape.rollback = 0;
    shape.head_dim = 64;
    const Tokens tokens(shape, 400, 14);
    Twins twins(shape);
    for (int first = 0; first < tokens.count; first += chunk) twins.append(tokens, first, chunk);
    CAPTURE(chunk);
    twins.check_equal();
  }
}

TEST_CASE("tokens taken back and appended again") {
  const CacheShape shape;
  const Tokens tokens(shape, 300, 2), other(shape, 300, 3);
  Twins twins(shape);
  twins.append(tokens, 0, 170);
  twins.append(other, 170, shape.rollback);
  for (Cache* cache : {&twins.cpu, &twins.cuda}) cache->kv_len[0] -= shape.rollback;
  twins.append(tokens, 170, 130);
  twins.check_equal();
}

TEST_CASE("a ragged batch of more sequences than a warp has lanes, some without tokens") {
  CacheShape shape;
  shape.batch = 70;
  shape.head_dim = 64;
  shape.num_kv_heads = 1;
  shape.max_pages = 2;
  std::vector<std::int32_t> starts = {0};
  std::mt19937 generator(5);
  for (int b = 0; b < shape.batch; ++b) {
    starts.push_back(starts.back() + static_cast<std::int32_t>(b % 5 == 0 ? 0 : generator() % 90));
  }
  const Tokens tokens(shape, starts.back(), 6);
  Twins twins(shape);
  twins.append(tokens, starts.data());
  twins.append(tokens, starts.data());
  twins.check_equal();
  // One token for each, then for the last few alone.
  twins.append(tokens, 0, shape.batch);
  std::vector<std::int32_t> last(shape.batch + 1, 0);
  for (int b = shape.batch - 3; b < shape.batch; ++b) last[b + 1] = last[b] + 2;
  twins.append(tokens, 0, 6, last.data());
  twins.check_equal();
}

TEST_CASE("many heads, more than a block's warps take at once") {
  CacheShape shape;
  shape.num_kv_heads = 7;
  shape.head_dim = 80;
  shape.batch = 2;
  const Tokens tokens(shape, 2 * 150, 7);
  Twins twins(shape);
  twins.append(tokens);
  twins.check_equal();
  for (int i = 0; i < 20; ++i) twins.append(tokens, i, 4);
  twins.check_equal();
}

TEST_CASE("odd values: NaN, infinities, zeros of both signs, constants, huge and tiny ones") {
  const float inf = std::numeric_limits<float>::infinity();
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBf16}) {
    for (const std::string meta : kMetaNames) {
      for (const std::string format : {"8", "2", "1.5"}) {
        CacheShape shape = one_tile(128, format, format, 0);
        shape.dtype = dtype;
        shape.meta = meta;
        Tokens tokens(shape, shape.num_sinks + kTileTokens, 8);
        for (Bytes* bytes : {&tokens.k, &tokens.v}) {
          const auto put = [&](int token, int channel, float x) {
            store_float(dtype, bytes->data(), (shape.num_sinks + token) * shape.head_dim + channel, x);
          };
          put(1, 33, quiet_nan());
          put(2, 127, -quiet_nan());
          put(3, 0, inf);
          put(4, 64, -inf);
          put(5, 10, inf);
          put(5, 11, -inf);
          for (int c = 0; c < shape.head_dim; ++c) {
            put(6, c, -0.0f);
            put(7, c, c % 2 == 0 ? 0.0f : -0.0f);
            put(8, c, c % 2 == 0 ? -0.0f : 0.0f);
            put(9, c, 3.25f);
            put(10, c, -3.25f);
            put(11, c, c % 2 == 0 ? 60000.0f : -60000.0f);
            put(12, c, c % 3 == 0 ? 1e-7f : -1e-7f);
            put(13, c, 100.0f + 1e-3f * static_cast<float>(c));
          }
        }
        CAPTURE(meta);
        CAPTURE(format);
        CAPTURE(static_cast<int>(dtype));
        for (const std::vector<float>& clips : {std::vector{1.0f}, {1.0f, 0.7f, 0.9f, 0.7f}}) {
          Twins twins(shape);
          twins.set_clips(clips, clips);
          twins.append(tokens);
          twins.check_equal();
        }
      }
    }
  }
}

TEST_CASE("rows at any address and stride") {
  for (const DType dtype : {DType::kF32, DType::kF16}) {
    CacheShape shape;
    shape.dtype = dtype;
    const int count = 150, bytes = dtype_bytes(dtype);
    const std::int64_t token_stride = shape.num_kv_heads * (shape.head_dim + 1) + 3, head_stride = shape.head_dim + 1;
    const Bytes rows = test::to_dtype(test::random_floats(2 * (count * token_stride + 1), 9), dtype);
    Twins twins(shape);
    for (const int first : {0, 100, 104}) {
      const int n = first == 0 ? 100 : first == 100 ? 4 : count - first;
      for (Cache* cache : {&twins.cpu, &twins.cuda}) {
        AppendArgs args = cache->append_args(Tokens(shape, 1, 0), 0, 1);
        const std::uint8_t* k = rows.data() + (1 + first * token_stride) * bytes;
        args.k = {k, token_stride, head_stride};
        args.v = {k + count * token_stride * bytes, token_stride, head_stride};
        args.tokens.num_tokens = n;
        cache == &twins.cpu ? cpu::append(args, cpu::kSerial) : cuda::append(args, nullptr);
      }
    }
    twins.check_equal();
  }
}

TEST_CASE("a tile without a page is left out, and everything else is done") {
  for (const std::int32_t page : {-1, 1000}) {
    for (const int chunk : {250, 5}) {
      const CacheShape shape;
      const Tokens tokens(shape, 250, 10);
      Twins twins(shape);
      const std::int32_t lost = twins.cuda.page_table[1];
      twins.cuda.page_table[1] = page;
      for (int first = 0; first < tokens.count; first += chunk) twins.append(tokens, first, chunk);
      const std::size_t bytes = twins.cpu.pages.size() / twins.cpu.view.num_pages;
      std::fill_n(twins.cpu.pages.begin() + static_cast<std::ptrdiff_t>(lost * bytes), bytes, test::kNothing);
      twins.check_equal();
    }
  }
}

TEST_CASE("a page table that is too narrow is not read beyond its end") {
  CacheShape shape;
  shape.max_pages = 1;
  const Tokens tokens(shape, 250, 11);
  Cache cache(shape);
  cuda::append(cache.append_args(tokens, 0, tokens.count), nullptr);
  CHECK(cache.kv_len[0] == 250);
}

TEST_CASE("no tokens, no sequences") {
  CacheShape shape;
  const Tokens tokens(shape, 1, 12);
  Cache cache(shape);
  cuda::append(cache.append_args(tokens, 0, 0), nullptr);
  CHECK(cache.kv_len[0] == 0);
  shape.batch = 0;
  Cache empty(shape);
  cuda::append(empty.append_args(tokens, 0, 0), nullptr);
}

TEST_CASE("other arrangements and pages at odd addresses are refused") {
  CacheShape shape;
  const Tokens tokens(shape, 1, 13);
  Cache odd(shape);
  odd.view.pages += 8;
  CHECK_THROWS_WITH_AS(cuda::append(odd.append_args(tokens, 0, 1), nullptr),
                       "pages starts 8 bytes behind a multiple of 16, and the CUDA kernels move 16 bytes at once; give "
                       "it memory of its own, as torch.empty does",
                       std::invalid_argument);
  shape.arrangement = "lanes";
  const Cache lanes(shape);
  CHECK_THROWS_WITH_AS(cuda::append(lanes.append_args(tokens, 0, 1), nullptr),
                       "the CUDA kernels keep pages in the arrangement mma, and these are in lanes: make the cache on "
                       "its CUDA device, or repack the pages",
                       std::invalid_argument);
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

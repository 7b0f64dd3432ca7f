// The kernels around the cache against the CPU backend: maps of heads, gathers, rows of plain matrices, pages, merging.
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "core/softmax.h"
#include "support/cache.h"
#include "third_party/doctest.h"

namespace skvq {
namespace {

using test::Bytes;
using test::Cache;
using test::CacheShape;
using test::Tokens;

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBf16};

std::vector<std::int32_t> permutations(int heads, int dim, unsigned seed) {
  std::vector<std::int32_t> p(static_cast<std::size_t>(heads) * dim);
  std::mt19937 generator(seed);
  for (int h = 0; h < heads; ++h) {
    std::iota(p.begin() + h * dim, p.begin() + (h + 1) * dim, 0);
    std::shuffle(p.begin() + h * dim, p.begin() + (h + 1) * dim, generator);
  }
  return p;
}

TEST_SUITE_BEGIN("row_kernels");

// Tables of a door; the last three bits of `which` leave out some of them.
struct Door {
  int kv_heads, ratio, dim;
  std::vector<std::int32_t> permutation;
  std::vector<float> shift, scale, matrix, share;

  Door(int kv_heads_, int ratio_, int dim_, int tokens)
      : kv_heads(kv_heads_),
        ratio(ratio_),
        dim(dim_),
        permutation(permutations(kv_heads, dim, 1)),
        shift(test::random_floats(kv_heads * dim, 2)),
        scale(test::random_floats(kv_heads * dim, 3)),
        matrix(test::random_floats(kv_heads * dim * dim, 4)),
        share(test::random_floats(tokens * kv_heads * ratio, 5)) {}

  void put(MapHeadsArgs& a, int which) const {
    a.num_heads = kv_heads * ratio;
    a.head_dim = dim;
    a.ratio = ratio;
    a.permutation = which & 1 ? permutation.data() : nullptr;
    a.shift = which & 2 ? shift.data() : nullptr;
    a.scale = which & 4 ? scale.data() : nullptr;
    a.matrix = which & 24 ? matrix.data() : nullptr;
    a.matrix_per_head = (which & 16) != 0;
    a.share = which & 2 ? share.data() : nullptr;
  }
};

TEST_CASE("heads are mapped to the same bytes") {
  for (const int dim : {16, 80, 128, 512}) {
    const int tokens = dim == 512 ? 3 : 7, ratio = dim == 80 ? 3 : 2;
    const Door door(2, ratio, dim, tokens);
    // Rows with room between them.
    const std::int64_t head_stride = dim + 5, token_stride = 2 * ratio * head_stride + 3;
    for (const DType dtype : kDTypes) {
      const Bytes x = test::to_dtype(test::random_floats(tokens * token_stride, 6), dtype);
      for (const int which : {0, 1, 2, 4, 7, 8, 15, 16, 23}) {
        for (const bool leave : {false, true}) {
          MapHeadsArgs a{};
          a.x = {x.data(), token_stride, head_stride};
          a.dtype = dtype;
          a.num_tokens = tokens;
          door.put(a, which);
          a.leave = leave;
          Bytes cpu(static_cast<std::size_t>(tokens) * a.num_heads * dim * dtype_bytes(dtype), test::kNothing);
          Bytes cuda = cpu;
          a.out = cpu.data();
          cpu::map_heads(a, cpu::kSerial);
          a.out = cuda.data();
          cuda::map_heads(a, nullptr);
          CAPTURE(dim);
          CAPTURE(which);
          CAPTURE(leave);
          CHECK(cpu == cuda);
        }
      }
    }
  }
}

TEST_CASE("channels are gathered") {
  for (const int bytes : {2, 4}) {
    const int rows = 9, heads = 3, dim = 80;
    const auto permutation = permutations(heads, dim, 7);
    Bytes x(static_cast<std::size_t>(rows) * heads * dim * bytes);
    std::iota(x.begin(), x.end(), std::uint8_t{0});
    Bytes cpu(x.size(), test::kNothing), cuda = cpu;
    cpu::permute_channels({x.data(), permutation.data(), cpu.data(), rows, heads, dim, bytes}, cpu::kSerial);
    cuda::permute_channels({x.data(), permutation.data(), cuda.data(), rows, heads, dim, bytes}, nullptr);
    CHECK(cpu == cuda);
  }
}

TEST_CASE("rows of a matrix in groups of any size") {
  const std::vector<std::int32_t> starts = {0, 1, 8, 21, 22, 100, 363};
  const int rows = 7, groups = static_cast<int>(starts.size()) - 1, channels = starts.back();
  const std::vector<float> clip = {1.0f, 0.9f, 0.5f, 1.0f, 0.8f, 0.95f, 0.7f, 0.6f, 1.0f, 0.6f, 0.55f, 0.9f};
  for (const CodeTraits& code : kCodes) {
    for (const DType dtype : kDTypes) {
      for (const Meta meta : {Meta::kE4m3, Meta::kFp16}) {
        std::vector<float> values = test::random_floats(static_cast<std::size_t>(rows) * channels, 8);
        values[3 * channels + 30] = quiet_nan();
        values[4 * channels + 150] = -minus_infinity();
        for (int c = 0; c < channels; ++c) values[5 * channels + c] = c % 2 == 0 ? -0.0f : 0.0f;
        const Bytes x = test::to_dtype(values, dtype);
        QuantizeRowsArgs a{};
        a.x = x.data();
        a.dtype = dtype;
        a.num_rows = rows;
        a.num_channels = channels;
        a.num_groups = groups;
        for (int g = 0; g < groups; ++g) a.row_bytes += group_row_bytes(code.code, starts[g + 1] - starts[g]);
        a.group_start = starts.data();
        const int choices = dtype == DType::kF16 ? 1 : 2;
        a.clip = {meta == Meta::kE4m3 ? clip.data() : nullptr, choices};
        a.code = code.code;
        a.meta_type = meta;
        a.exponents = {-3, -2};
        struct Result {
          Bytes codes, metas;
          std::vector<float> decoded;
        } result[2];
        for (Result& r : result) {
          const bool on_cpu = &r == result;
          r.codes.assign(static_cast<std::size_t>(rows) * a.row_bytes, test::kNothing);
          r.metas.assign(static_cast<std::size_t>(rows) * groups * 2 * meta_bytes(meta), test::kNothing);
          r.decoded.assign(static_cast<std::size_t>(rows) * channels, quiet_nan());
          a.codes = r.codes.data();
          a.meta = r.metas.data();
          a.decoded = r.decoded.data();
          on_cpu ? cpu::quantize_rows(a, cpu::kSerial) : cuda::quantize_rows(a, nullptr);
          on_cpu ? cpu::dequantize_rows(a, cpu::kSerial) : cuda::dequantize_rows(a, nullptr);
        }
        CAPTURE(static_cast<int>(code.code));
        CAPTURE(static_cast<int>(dtype));
        CHECK(result[0].codes == result[1].codes);
        CHECK(result[0].metas == result[1].metas);
        CHECK(std::memcmp(result[0].decoded.data(), result[1].decoded.data(), result[0].decoded.size() * 4) == 0);
      }
    }
  }
}

TEST_CASE("pages are unpacked to the values that the CPU finds") {
  for (const char* format : test::kSampleFormats) {
    CacheShape shape;
    shape.k = format;
    shape.v = format;
    shape.group = 32;
    shape.meta = format[0] == '3' ? "fp16" : "fp8";
    const Tokens tokens(shape, 250, 9);
    Cache cache(shape);
    cpu::append(cache.append_args(tokens, 0, tokens.count), cpu::kSerial);
    const std::vector<std::int32_t> ids = {cache.page_table[2], cache.page_table[0], cache.page_table[2]};
    const std::size_t n = ids.size() * shape.num_kv_heads * kTileTokens * shape.head_dim;
    std::vector<float> k[2], v[2];
    for (const int i : {0, 1}) {
      k[i].assign(n, quiet_nan());
      v[i] = k[i];
      const UnpackPagesArgs args{cache.pages.data(),
                                 ids.data(),
                                 cache.exponents.data(),
                                 cache.view.format,
                                 static_cast<int>(ids.size()),
                                 shape.num_kv_heads,
                                 k[i].data(),
                                 v[i].data()};
      i == 0 ? cpu::unpack_pages(args, cpu::kSerial) : cuda::unpack_pages(args, nullptr);
    }
    CAPTURE(format);
    CHECK(k[0] == k[1]);
    CHECK(v[0] == v[1]);
  }
}

TEST_CASE("pages of every size are copied, those named -1 are not") {
  for (const std::int64_t bytes : {16, 4352, 70000}) {
    alignas(16) static std::uint8_t pool[6 * 70000];
    for (std::int64_t i = 0; i < 6 * bytes; ++i) pool[i] = static_cast<std::uint8_t>(i * 37 + i / 251);
    const Bytes before(pool, pool + 6 * bytes);
    const std::int32_t source[] = {4, -1, 0, 4}, target[] = {1, 2, 5, 3};
    cuda::copy_pages({pool, source, target, 4, bytes}, nullptr);
    const int expected[] = {0, 4, 2, 4, 4, 0};
    for (int page = 0; page < 6; ++page) {
      CAPTURE(page);
      CHECK(std::equal(pool + page * bytes, pool + (page + 1) * bytes, before.begin() + expected[page] * bytes));
    }
  }
}

TEST_CASE("pages at odd addresses, of odd sizes and of other arrangements are refused") {
  alignas(16) std::uint8_t pool[64];
  const std::int32_t ids[] = {0};
  CHECK_THROWS_WITH_AS(cuda::copy_pages({pool + 4, ids, ids, 1, 16}, nullptr),
                       "pages starts 4 bytes behind a multiple of 16, and the CUDA kernels move 16 bytes at once; give "
                       "it memory of its own, as torch.empty does",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(cuda::copy_pages({pool, ids, ids, 1, 24}, nullptr),
                       "a page has 24 bytes, no multiple of 16: these are not the pages of a cache",
                       std::invalid_argument);
  UnpackPagesArgs args{};
  args.pages = pool;
  args.format = parse_record_format("2", "2", 128, "fp8", "rows", 128);
  CHECK_THROWS_WITH_AS(cuda::unpack_pages(args, nullptr),
                       "the CUDA kernels keep pages in the arrangement mma, and these are in rows: make the cache on "
                       "its CUDA device, or repack the pages",
                       std::invalid_argument);
}

TEST_CASE("partial results are merged") {
  const int rows = 11, dim = 80;
  for (const DType dtype : kDTypes) {
    const Bytes out_a = test::to_dtype(test::random_floats(rows * dim, 10), dtype),
                out_b = test::to_dtype(test::random_floats(rows * dim, 11), dtype);
    std::vector<float> lse_a = test::random_floats(rows, 12), lse_b = test::random_floats(rows, 13);
    lse_a[1] = lse_a[2] = lse_b[2] = lse_b[3] = minus_infinity();
    lse_a[4] = 200.0f;
    Bytes out[2];
    std::vector<float> lse[2];
    for (const int i : {0, 1}) {
      out[i].assign(out_a.size(), test::kNothing);
      lse[i].assign(rows, quiet_nan());
      const MergeArgs args{out_a.data(),  out_b.data(), lse_a.data(), lse_b.data(), out[i].data(),
                           lse[i].data(), rows,         dim,          dtype};
      i == 0 ? cpu::merge_states(args, cpu::kSerial) : cuda::merge_states(args, nullptr);
    }
    CHECK(out[0] == out[1]);
    CHECK(lse[0] == lse[1]);
  }
}

TEST_SUITE_END();

}  // namespace
}  // namespace skvq

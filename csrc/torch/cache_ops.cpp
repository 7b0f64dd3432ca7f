// append, decode_attention and what belongs to them.
#include "torch/cache_ops.h"

#include <cmath>

#include "core/window.h"
#include "torch/checks.h"

namespace skvq::ops {
namespace {

void check_page(const CacheView& c, int sequence, int tile) {
  const std::int32_t page = c.page_table[static_cast<std::int64_t>(sequence) * c.max_pages + tile];
  SKVQ_CHECK(page >= 0 && page < c.num_pages, "page_table[", sequence, ", ", tile, "] is ", page, "; tokens ",
             c.num_sinks + tile * kTileTokens, " to ", c.num_sinks + (tile + 1) * kTileTokens - 1, " of sequence ",
             sequence, " need a page in 0 to ", c.num_pages - 1, ": allocate more pages");
}

void check_pages_to_write(const AppendArgs& a) {
  const CacheView& c = a.cache;
  for (int b = 0; b < c.batch; ++b) {
    const std::int64_t new_len = static_cast<std::int64_t>(c.kv_len[b]) + a.tokens.length(b);
    SKVQ_CHECK(c.kv_len[b] >= 0 && new_len < (1 << 30), "sequence ", b, " has kv_len ", c.kv_len[b],
               " and would grow to ", new_len, " tokens; allowed is 0 to ", (1 << 30) - 1);
    const int tiles = packed_tiles(static_cast<int>(new_len), c.num_sinks, c.window);
    SKVQ_CHECK(tiles <= c.max_pages, "sequence ", b, " would grow to ", new_len, " tokens and need ", tiles,
               " pages, but page_table has room for ", c.max_pages, ": make it wider");
    for (int tile = packed_tiles(c.kv_len[b], c.num_sinks, c.window); tile < tiles; ++tile) check_page(c, b, tile);
  }
}

void check_pages_to_read(const DecodeArgs& a) {
  const CacheView& c = a.cache;
  for (int b = 0; b < c.batch; ++b) {
    const int q_len = a.queries.length(b), kv_len = c.kv_len[b];
    if (q_len == 0) continue;
    SKVQ_CHECK(kv_len >= 0, "kv_len of sequence ", b, " is ", kv_len);
    SKVQ_CHECK(!a.queries_in_cache || q_len <= kv_len, "sequence ", b, " has ", q_len, " queries but ", kv_len,
               " cached tokens; append the tokens first, or pass queries_in_cache=False for queries after the cache");
    const int tiles = packed_tiles(kv_len, c.num_sinks, c.window);
    SKVQ_CHECK(tiles <= c.max_pages, "sequence ", b, " has ", kv_len, " tokens in ", tiles,
               " pages, but page_table has room for ", c.max_pages);
    const int first_position = a.queries_in_cache ? kv_len - q_len : kv_len;
    const int first_seen = visible(first_position, kv_len, a.sliding_window).begin - c.num_sinks;
    for (int tile = max_int(0, first_seen) / kTileTokens; tile < tiles; ++tile) check_page(c, b, tile);
  }
}

}  // namespace

void append(const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens, Tensor pages, const Tensor& page_table,
            Tensor sink_k, Tensor sink_v, Tensor ring_k, Tensor ring_v, Tensor kv_len, const Tensor& k_clip,
            const Tensor& v_clip, const Tensor& exponents, const std::string& k_format, const std::string& v_format,
            std::int64_t group, const std::string& meta, const std::string& arrangement, std::int64_t window) {
  const Place place = place_of(k, "k");
  AppendArgs a{};
  a.cache = make_cache_view({pages, page_table, sink_k, sink_v, ring_k, ring_v, kv_len, exponents},
                            {k_format, v_format, group, meta, arrangement}, window, place);
  check_shape(k, "k", {-1, a.cache.num_kv_heads, a.cache.head_dim});
  check_shape(v, "v", {k.size(0), a.cache.num_kv_heads, a.cache.head_dim});
  SKVQ_CHECK(k.scalar_type() == ring_k.scalar_type() && v.scalar_type() == ring_k.scalar_type(), "k and v have dtypes ",
             torch::headeronly::toString(k.scalar_type()), " and ", torch::headeronly::toString(v.scalar_type()),
             "; the cache holds ", torch::headeronly::toString(ring_k.scalar_type()));
  a.k = make_rows(k, "k", place);
  a.v = make_rows(v, "v", place);
  a.tokens = make_ragged(cu_seqlens, "cu_seqlens", k.size(0), a.cache.batch, place);
  a.k_clip = clip_table(k_clip, "k_clip", {a.cache.num_kv_heads, a.cache.format.k.num_groups()}, place);
  a.v_clip = clip_table(v_clip, "v_clip", {a.cache.num_kv_heads, a.cache.format.v.num_groups()}, place);
  if (place.on_cpu) check_pages_to_write(a);
  place.backend->append(a, place);
}

namespace {

// What the size of a workspace depends on, too: the cache and the shape of the queries.
DecodeArgs decode_shapes(const Tensor& q, const OptionalTensor& cu_seqlens_q, const CacheTensors& cache,
                         const FormatText& format, std::int64_t window, std::int64_t sliding_window,
                         const Place& place) {
  DecodeArgs a{};
  a.cache = make_cache_view(cache, format, window, place);
  const int kv_heads = a.cache.num_kv_heads;
  check_shape(q, "q", {-1, -1, a.cache.head_dim});
  const std::int64_t num_tokens = q.size(0), num_q_heads = q.size(1);
  SKVQ_CHECK(num_q_heads > 0 && num_q_heads % kv_heads == 0, "q has ", num_q_heads,
             " heads; expected a multiple of the cache's ", kv_heads, " KV heads");
  SKVQ_CHECK(sliding_window >= 0, "sliding_window is ", sliding_window,
             "; expected 0 (none) or the number of tokens a query sees");
  a.q = make_aligned_rows(q, "q", place);
  a.q_dtype = float_dtype(q, "q");
  a.queries = make_ragged(cu_seqlens_q, "cu_seqlens_q", num_tokens, a.cache.batch, place);
  a.num_q_heads = static_cast<int>(num_q_heads);
  a.sliding_window = static_cast<int>(std::min<std::int64_t>(sliding_window, 1 << 30));
  return a;
}

// The caller's workspace, or a new one in `own`.
void* workspace_data(const OptionalTensor& given, std::size_t needed, const Tensor& q, const Place& place,
                     OptionalTensor& own) {
  if (!given) {
    if (needed == 0) return nullptr;
    own = new_tensor(q, {static_cast<std::int64_t>(needed)}, ScalarType::Byte);
    return own->mutable_data_ptr();
  }
  check_tensor(*given, "workspace", ScalarType::Byte, {-1}, place);
  check_alignment(*given, "workspace", place);
  const auto found = static_cast<std::size_t>(given->numel());
  SKVQ_CHECK(found >= needed, "workspace has ", found, " bytes and ", needed,
             " are needed; make it as decode_workspace_bytes says, or pass none");
  return given->mutable_data_ptr();
}

}  // namespace

std::int64_t decode_workspace_bytes(const Tensor& q, const OptionalTensor& cu_seqlens_q, const Tensor& pages,
                                    const Tensor& page_table, const Tensor& sink_k, const Tensor& sink_v,
                                    const Tensor& ring_k, const Tensor& ring_v, const Tensor& kv_len,
                                    const Tensor& exponents, const std::string& k_format, const std::string& v_format,
                                    std::int64_t group, const std::string& meta, const std::string& arrangement,
                                    std::int64_t window, std::int64_t sliding_window) {
  const Place place = place_of(q, "q");
  const DecodeArgs a =
      decode_shapes(q, cu_seqlens_q, {pages, page_table, sink_k, sink_v, ring_k, ring_v, kv_len, exponents},
                    {k_format, v_format, group, meta, arrangement}, window, sliding_window, place);
  return static_cast<std::int64_t>(place.backend->decode_workspace_bytes(a, place));
}

std::tuple<Tensor, Tensor> decode_attention(const Tensor& q, const OptionalTensor& cu_seqlens_q, const Tensor& pages,
                                            const Tensor& page_table, const Tensor& sink_k, const Tensor& sink_v,
                                            const Tensor& ring_k, const Tensor& ring_v, const Tensor& kv_len,
                                            const Tensor& exponents, const OptionalTensor& learned_sinks,
                                            const OptionalTensor& logit_shift, const OptionalTensor& workspace,
                                            const std::string& k_format, const std::string& v_format,
                                            std::int64_t group, const std::string& meta, const std::string& arrangement,
                                            std::int64_t window, double softmax_scale, std::int64_t sliding_window,
                                            double softcap, bool queries_in_cache, bool exact) {
  const Place place = place_of(q, "q");
  DecodeArgs a = decode_shapes(q, cu_seqlens_q, {pages, page_table, sink_k, sink_v, ring_k, ring_v, kv_len, exponents},
                               {k_format, v_format, group, meta, arrangement}, window, sliding_window, place);
  SKVQ_CHECK(std::isfinite(softmax_scale), "softmax_scale is ", softmax_scale, "; expected a finite number");
  SKVQ_CHECK(std::isfinite(softcap) && softcap >= 0.0, "softcap is ", softcap,
             "; expected 0 (none) or a positive number");
  a.softmax_scale = static_cast<float>(softmax_scale);
  a.softcap = static_cast<float>(softcap);
  a.queries_in_cache = queries_in_cache;
  a.exact = exact;
  const std::int64_t num_tokens = a.queries.num_tokens, num_q_heads = a.num_q_heads;
  if (learned_sinks) {
    check_tensor(*learned_sinks, "learned_sinks", ScalarType::Float, {num_q_heads}, place);
    a.learned_sinks = learned_sinks->const_data_ptr<float>();
  }
  if (logit_shift) {
    check_tensor(*logit_shift, "logit_shift", ScalarType::Float, {num_tokens, num_q_heads}, place);
    a.logit_shift = logit_shift->const_data_ptr<float>();
  }
  if (place.on_cpu) check_pages_to_read(a);
  const std::size_t needed = place.backend->decode_workspace_bytes(a, place);
  Tensor out = new_tensor(q, {num_tokens, num_q_heads, a.cache.head_dim}, q.scalar_type());
  Tensor lse = new_tensor(q, {num_tokens, num_q_heads}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  OptionalTensor own;
  void* data = workspace_data(workspace, needed, q, place, own);
  place.backend->decode_attention(a, data, place);
  return {out, lse};
}

void check_decode_format(const std::string& k_format, const std::string& v_format, std::int64_t group,
                         const std::string& meta, const std::string& arrangement, std::int64_t head_dim,
                         ScalarType dtype, const std::string& device_type) {
  SKVQ_CHECK(device_type == "cpu" || device_type == "cuda", "device_type is ", device_type, "; expected cpu or cuda");
  const RecordFormat format = parse({k_format, v_format, group, meta, arrangement}, head_dim);
  const DType rows = dtype_of(dtype, "dtype");
  (device_type == "cpu" ? cpu_backend() : cuda_backend()).check_decode_format(format, rows, rows);
}

}  // namespace skvq::ops

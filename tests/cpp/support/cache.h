// A cache that owns its buffers, tokens to append and queries to ask.
#pragma once

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "core/minifloat.h"
#include "core/window.h"
#include "support/backend.h"
#include "support/formats.h"

namespace skvq::test {

using Bytes = std::vector<std::uint8_t>;

struct CacheShape {
  std::string k = "2", v = "1.5", meta = "fp8", arrangement = kArrangement;
  int group = 128, head_dim = 128;
  int batch = 1, num_kv_heads = 2, num_sinks = 5, window = 32, rollback = 16, max_pages = 8;
  DType dtype = kDType;
};

inline Bytes to_dtype(const std::vector<float>& x, DType dtype) {
  Bytes bytes(x.size() * dtype_bytes(dtype));
  for (std::size_t i = 0; i < x.size(); ++i) store_float(dtype, bytes.data(), static_cast<std::int64_t>(i), x[i]);
  return bytes;
}

// K and V rows of tokens [num_tokens, num_kv_heads, head_dim], sequence after sequence.
struct Tokens {
  Bytes k, v;
  int count;

  Tokens(const CacheShape& s, int num_tokens, unsigned seed)
      : k(to_dtype(random_floats(elements(s, num_tokens), seed), s.dtype)),
        v(to_dtype(random_floats(elements(s, num_tokens), seed + 1), s.dtype)),
        count(num_tokens) {}
  // The same with NaN everywhere but in tokens [first, first + n): what an append of those must not look at.
  Tokens only(int first, int n) const {
    Tokens poisoned = *this;
    const std::size_t row = k.size() / count;
    for (Bytes* bytes : {&poisoned.k, &poisoned.v}) {
      std::fill_n(bytes->begin(), first * row, kNothing);
      std::fill(bytes->begin() + (first + n) * row, bytes->end(), kNothing);
    }
    return poisoned;
  }
  static std::size_t elements(const CacheShape& s, int num_tokens) {
    return static_cast<std::size_t>(num_tokens) * s.num_kv_heads * s.head_dim;
  }
};

class Cache {
 public:
  explicit Cache(const CacheShape& s) : shape(s) {
    view.format = parse_record_format(s.k, s.v, s.group, s.meta, s.arrangement, s.head_dim);
    view.num_pages = s.batch * s.max_pages;
    view.batch = s.batch;
    view.num_kv_heads = s.num_kv_heads;
    view.head_dim = s.head_dim;
    view.max_pages = s.max_pages;
    view.num_sinks = s.num_sinks;
    view.ring_slots = ring_slots(s.window, s.rollback);
    view.window = s.window;
    view.dtype = s.dtype;
    pages.assign(static_cast<std::size_t>(view.num_pages) * s.num_kv_heads * view.format.record_bytes(), kNothing);
    // Pages in no particular order.
    page_table.resize(view.num_pages);
    std::iota(page_table.begin(), page_table.end(), 0);
    std::shuffle(page_table.begin(), page_table.end(), std::mt19937(7));
    const std::size_t row = static_cast<std::size_t>(s.num_kv_heads) * s.head_dim * dtype_bytes(s.dtype);
    sink_k.assign(s.batch * s.num_sinks * row, kNothing);
    ring_k.assign(s.batch * view.ring_slots * row, kNothing);
    sink_v = sink_k;
    ring_v = ring_k;
    kv_len.assign(s.batch, 0);
    for (int head = 0; head < s.num_kv_heads; ++head) {
      for (const int e : {-3, -2, -2, -1}) exponents.push_back(e);  // normal data sits well inside E4M3 then
    }
    set_clips({1.0f}, {0.9f});
    view.pages = pages.data();
    view.page_table = page_table.data();
    view.sink_k = sink_k.data();
    view.sink_v = sink_v.data();
    view.ring_k = ring_k.data();
    view.ring_v = ring_v.data();
    view.kv_len = kv_len.data();
    view.exponents = exponents.data();
  }
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  // Tokens [first, first + count) of `tokens`; with cu_seqlens these are shared out to the sequences.
  AppendArgs append_args(const Tokens& tokens, int first, int count, const std::int32_t* cu_seqlens = nullptr) const {
    const std::int64_t row = static_cast<std::int64_t>(shape.num_kv_heads) * shape.head_dim;
    const std::int64_t skip = first * row * dtype_bytes(shape.dtype);
    return {view,
            {tokens.k.data() + skip, row, shape.head_dim},
            {tokens.v.data() + skip, row, shape.head_dim},
            {cu_seqlens, count, shape.batch},
            {k_clip.data(), clip_choices},
            {v_clip.data(), clip_choices}};
  }
  // Every group gets these ratios; as many for K as for V.
  void set_clips(const std::vector<float>& k, const std::vector<float>& v) {
    clip_choices = static_cast<int>(k.size());
    k_clip.clear();
    v_clip.clear();
    for (int i = 0; i < shape.num_kv_heads * view.format.k.num_groups(); ++i)
      k_clip.insert(k_clip.end(), k.begin(), k.end());
    for (int i = 0; i < shape.num_kv_heads * view.format.v.num_groups(); ++i)
      v_clip.insert(v_clip.end(), v.begin(), v.end());
  }
  void append(const Tokens& tokens, const std::int32_t* cu_seqlens = nullptr) {
    test::append(append_args(tokens, 0, tokens.count, cu_seqlens));
  }

  CacheShape shape;
  CacheView view{};
  Bytes pages, sink_k, sink_v, ring_k, ring_v;
  std::vector<std::int32_t> page_table, kv_len, exponents;
  std::vector<float> k_clip, v_clip;
  int clip_choices = 1;
};

// Queries against a cache and room for the answer.
struct Queries {
  Bytes q, out;
  std::vector<float> lse;
  DecodeArgs args{};

  Queries(const Cache& cache, int num_tokens, int ratio, unsigned seed, const std::int32_t* cu_seqlens = nullptr) {
    const CacheShape& s = cache.shape;
    const int heads = s.num_kv_heads * ratio;
    q = to_dtype(random_floats(static_cast<std::size_t>(num_tokens) * heads * s.head_dim, seed), s.dtype);
    out.assign(q.size(), kNothing);
    lse.assign(static_cast<std::size_t>(num_tokens) * heads, quiet_nan());
    args.cache = cache.view;
    args.q = {q.data(), static_cast<std::int64_t>(heads) * s.head_dim, s.head_dim};
    args.queries = {cu_seqlens, num_tokens, s.batch};
    args.q_dtype = s.dtype;
    args.num_q_heads = heads;
    args.softmax_scale = 0.125f;
    args.queries_in_cache = true;
    args.exact = true;
    args.out = out.data();
    args.lse = lse.data();
  }
  float out_at(std::int64_t i) const { return load_float(args.q_dtype, out.data(), i); }
};

}  // namespace skvq::test

// Attention by plain sums in double over what a cache holds on the host, and the same mathematics rounded to a type
// where a framework rounds: the error of the latter sets the tolerance.
#pragma once

#include <cmath>
#include <functional>
#include <vector>

#include "cpu/cpu.h"
#include "gpu/twin.h"

namespace skvq::bench {

struct Attention {
  std::vector<double> out;  // [num_q_tokens, num_q_heads, head_dim]
  std::vector<double> lse;  // [num_q_tokens, num_q_heads]
};

// K and V of one head of one sequence, as a query reads them that sees packed tokens up to `packed_end`.
struct HeadRows {
  std::vector<float> k, v;

  HeadRows(const CacheView& c, int sequence, int head, int packed_end) {
    const int kv_len = c.kv_len[sequence], d = c.head_dim;
    k.resize(static_cast<std::size_t>(kv_len) * d);
    v.resize(k.size());
    for (int p = 0; p < kv_len; ++p) {
      const bool sink = p < c.num_sinks;
      if (!sink && p < packed_end) continue;
      const std::int64_t row = sink ? c.sink_row(sequence, p, head) : c.ring_row(sequence, p, head);
      for (int i = 0; i < d; ++i) {
        k[static_cast<std::size_t>(p) * d + i] = load_float(c.dtype, sink ? c.sink_k : c.ring_k, row + i);
        v[static_cast<std::size_t>(p) * d + i] = load_float(c.dtype, sink ? c.sink_v : c.ring_v, row + i);
      }
    }
    unpack(c, sequence, head, std::min(packed_end, kv_len));
  }

 private:
  void unpack(const CacheView& c, int sequence, int head, int packed_end) {
    const int d = c.head_dim, tiles = std::max(0, packed_end - c.num_sinks) / kTileTokens;
    if (tiles == 0) return;
    std::vector<float> page_k(static_cast<std::size_t>(tiles) * c.num_kv_heads * kTileTokens * d),
        page_v(page_k.size());
    const std::int32_t* pages = c.page_table + static_cast<std::int64_t>(sequence) * c.max_pages;
    cpu::unpack_pages({c.pages, pages, c.exponents, c.format, tiles, c.num_kv_heads, page_k.data(), page_v.data()},
                      cpu::kSerial);
    for (int tile = 0; tile < tiles; ++tile) {
      const auto from = (static_cast<std::int64_t>(tile) * c.num_kv_heads + head) * kTileTokens * d;
      const auto to = (c.num_sinks + static_cast<std::int64_t>(tile) * kTileTokens) * d;
      std::copy_n(page_k.begin() + from, kTileTokens * d, k.begin() + to);
      std::copy_n(page_v.begin() + from, kTileTokens * d, v.begin() + to);
    }
  }
};

// `round`: what happens to K, V, logits and probabilities; nothing in the reference.
template <class Round>
void attend_row(const DecodeArgs& a, const HeadRows& rows, int position, std::int64_t token, int q_head, Round&& round,
                double* out, double& lse) {
  const int d = a.cache.head_dim, kv_len = static_cast<int>(rows.k.size()) / d;
  const TokenRange seen = visible(position, kv_len, a.sliding_window);
  const int count = std::max(0, seen.end - seen.begin);
  std::vector<double> logits(count);
  double max = a.learned_sinks ? a.learned_sinks[q_head] : -HUGE_VAL;
  const std::int64_t q_row = token * a.q.token_stride + q_head * a.q.head_stride;
  std::vector<double> q(d);
  for (int c = 0; c < d; ++c) q[c] = load_float(a.q_dtype, a.q.data, q_row + c);
  for (int i = 0; i < count; ++i) {
    const float* k = rows.k.data() + static_cast<std::size_t>(seen.begin + i) * d;
    double dot = 0.0;
    for (int c = 0; c < d; ++c) dot += q[c] * round(k[c]);
    double logit = dot * a.softmax_scale + (a.logit_shift ? a.logit_shift[token * a.num_q_heads + q_head] : 0.0);
    if (a.softcap > 0) logit = a.softcap * std::tanh(logit / a.softcap);
    logits[i] = round(logit);
    max = std::max(max, logits[i]);
  }
  double sum = a.learned_sinks ? std::exp(a.learned_sinks[q_head] - max) : 0.0;
  std::fill_n(out, d, 0.0);
  for (const double logit : logits) sum += std::exp(logit - max);
  for (int i = 0; i < count; ++i) {
    const float* v = rows.v.data() + static_cast<std::size_t>(seen.begin + i) * d;
    const double probability = round(std::exp(logits[i] - max) / sum);
    for (int c = 0; c < d; ++c) out[c] += probability * round(v[c]);
  }
  lse = sum > 0 ? max + std::log(sum) : -HUGE_VAL;
}

// `args` points to host memory; each sequence and KV head is an item of its own.
template <class Round>
Attention attend(const DecodeArgs& args, Round round) {
  const CacheView& c = args.cache;
  const int d = c.head_dim, ratio = args.num_q_heads / c.num_kv_heads;
  const std::int64_t rows = args.queries.num_tokens * args.num_q_heads;
  Attention result{std::vector<double>(rows * d), std::vector<double>(rows)};
  cpu::for_each(kPool, static_cast<std::int64_t>(c.batch) * c.num_kv_heads, cpu::kShortWork, [&](std::int64_t item) {
    const int b = static_cast<int>(item / c.num_kv_heads), head = static_cast<int>(item % c.num_kv_heads);
    const int length = args.queries.length(b), kv_len = c.kv_len[b];
    for (int i = 0; i < length; ++i) {
      const int position = kv_len + i - (args.queries_in_cache ? length : 0);
      const HeadRows head_rows(c, b, head, packed_end(c, position, kv_len));
      const std::int64_t token = args.queries.begin(b) + i;
      for (int q_head = head * ratio; q_head < (head + 1) * ratio; ++q_head) {
        const std::int64_t row = token * args.num_q_heads + q_head;
        attend_row(args, head_rows, position, token, q_head, round, result.out.data() + row * d, result.lse[row]);
      }
    }
  });
  return result;
}

inline double rounded(DType dtype, double x) {
  std::uint32_t bits = 0;
  store_float(dtype, &bits, 0, static_cast<float>(x));
  return load_float(dtype, &bits, 0);
}

// What is allowed to the output and the logarithm of each query.
struct Tolerance {
  std::vector<double> out, lse;  // [num_q_tokens]
};

// Twice the error of the same mathematics in `dtype`, plus twice the rounding that a sum of the size of the result
// suffers; for the logarithm also what fp32 leaves of it. Largest over the heads of a query: sequences differ too much
// in length.
inline Tolerance tolerance(const DecodeArgs& args, const Attention& want) {
  const DType dtype = args.q_dtype;
  const Attention plain = attend(args, [dtype](double x) { return rounded(dtype, x); });
  const std::size_t tokens = args.queries.num_tokens, heads = args.num_q_heads, width = heads * args.cache.head_dim;
  Tolerance t{std::vector<double>(tokens), std::vector<double>(tokens)};
  for (std::size_t token = 0; token < tokens; ++token) {
    double error = 0.0, rounding = 0.0, lse_error = 0.0, lse_size = 1.0;
    for (std::size_t i = token * width; i < (token + 1) * width; ++i) {
      error = std::max(error, std::fabs(rounded(dtype, plain.out[i]) - want.out[i]));
      const double cast = rounded(dtype, want.out[i]);
      rounding = std::max(rounding, std::fabs(rounded(dtype, rounded(dtype, cast + 0.3) - 0.3) - cast));
    }
    for (std::size_t i = token * heads; i < (token + 1) * heads; ++i) {
      if (want.lse[i] == -HUGE_VAL) continue;
      lse_error = std::max(lse_error, std::fabs(plain.lse[i] - want.lse[i]));
      lse_size = std::max(lse_size, std::fabs(want.lse[i]));
    }
    t.out[token] = 2 * error + 2 * rounding;
    t.lse[token] = 2 * lse_error + 1e-5 * lse_size;
  }
  return t;
}

}  // namespace skvq::bench

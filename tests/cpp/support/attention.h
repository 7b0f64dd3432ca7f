// Attention as a plain softmax in double over what a cache holds.
#pragma once

#include <cmath>

#include "support/cache.h"
#include "third_party/doctest.h"

namespace skvq::test {

// Dequantized pages of all sequences, [batch * max_pages, num_kv_heads, 64, head_dim].
struct Unpacked {
  std::vector<float> k, v;

  explicit Unpacked(const Cache& cache)
      : k(static_cast<std::size_t>(cache.view.num_pages) * cache.shape.num_kv_heads * kTileTokens *
          cache.shape.head_dim),
        v(k) {
    cpu::unpack_pages({cache.pages.data(), cache.page_table.data(), cache.exponents.data(), cache.view.format,
                       static_cast<int>(cache.view.num_pages), cache.shape.num_kv_heads, k.data(), v.data()},
                      cpu::kSerial);
  }
};

// One channel of the row of a token, from the segment a query reads it from.
inline double value_at(const Cache& cache, const Unpacked& unpacked, Side side, int sequence, int head, int position,
                       int packed_tokens, int channel) {
  const CacheShape& s = cache.shape;
  const CacheView& c = cache.view;
  const int after_sinks = position - s.num_sinks;
  if (after_sinks < 0) {
    return load_float(s.dtype, side == Side::kKey ? c.sink_k : c.sink_v,
                      c.sink_row(sequence, position, head) + channel);
  }
  if (after_sinks >= packed_tokens) {
    return load_float(s.dtype, side == Side::kKey ? c.ring_k : c.ring_v,
                      c.ring_row(sequence, position, head) + channel);
  }
  const std::size_t record =
      (static_cast<std::size_t>(sequence) * s.max_pages + after_sinks / kTileTokens) * s.num_kv_heads + head;
  return (side == Side::kKey ? unpacked.k
                             : unpacked.v)[(record * kTileTokens + after_sinks % kTileTokens) * s.head_dim + channel];
}

struct Row {
  std::vector<double> out;
  double lse;
};

// One query row. `token` counts in the query tensor, `position` in the sequence.
inline Row naive_row(const Cache& cache, const Unpacked& unpacked, const DecodeArgs& a, int sequence,
                     std::int64_t token, int position, int q_head) {
  const CacheShape& s = cache.shape;
  const int kv_len = cache.kv_len[sequence], head = q_head / (a.num_q_heads / s.num_kv_heads);
  const int seen = std::min(position + 1, kv_len);
  const int packed_tokens = std::max(0, seen - s.num_sinks - s.window) / kTileTokens * kTileTokens;
  const int first = a.sliding_window > 0 ? std::max(0, position - a.sliding_window + 1) : 0;
  std::vector<double> logits;
  double max = a.learned_sinks ? a.learned_sinks[q_head] : -HUGE_VAL;
  for (int p = first; p < seen; ++p) {
    double dot = 0.0;
    for (int c = 0; c < s.head_dim; ++c) {
      const double q = load_float(a.q_dtype, a.q.data, token * a.q.token_stride + q_head * a.q.head_stride + c);
      dot += q * value_at(cache, unpacked, Side::kKey, sequence, head, p, packed_tokens, c);
    }
    double logit = dot * a.softmax_scale + (a.logit_shift ? a.logit_shift[token * a.num_q_heads + q_head] : 0.0);
    if (a.softcap > 0) logit = a.softcap * std::tanh(logit / a.softcap);
    logits.push_back(logit);
    max = std::max(max, logit);
  }
  double sum = a.learned_sinks ? std::exp(a.learned_sinks[q_head] - max) : 0.0;
  std::vector<double> out(s.head_dim, 0.0);
  for (int p = first; p < seen; ++p) {
    const double probability = std::exp(logits[p - first] - max);
    sum += probability;
    for (int c = 0; c < s.head_dim; ++c) {
      out[c] += probability * value_at(cache, unpacked, Side::kValue, sequence, head, p, packed_tokens, c);
    }
  }
  for (double& o : out) o = sum > 0 ? o / sum : 0.0;
  return {out, sum > 0 ? max + std::log(sum) : -HUGE_VAL};
}

// The larger one; infinity where the difference is NaN.
inline double worse(double largest, double difference) {
  return difference <= largest ? largest : std::isnan(difference) ? HUGE_VAL : difference;
}

// Largest difference over all rows. What tolerance is due comes from the type of the output.
inline double largest_difference(const Cache& cache, const Queries& queries) {
  const Unpacked unpacked(cache);
  const DecodeArgs& a = queries.args;
  const int head_dim = cache.shape.head_dim;
  double largest = 0.0;
  for (int b = 0; b < cache.shape.batch; ++b) {
    const int length = a.queries.length(b);
    for (int i = 0; i < length; ++i) {
      const std::int64_t token = a.queries.begin(b) + i;
      const int position = cache.kv_len[b] + i - (a.queries_in_cache ? length : 0);
      for (int h = 0; h < a.num_q_heads; ++h) {
        const Row row = naive_row(cache, unpacked, a, b, token, position, h);
        const std::int64_t index = token * a.num_q_heads + h;
        if (row.lse == -HUGE_VAL) {
          REQUIRE(queries.lse[index] == -HUGE_VALF);
        } else {
          largest = worse(largest, std::fabs(row.lse - queries.lse[index]));
        }
        for (int c = 0; c < head_dim; ++c)
          largest = worse(largest, std::fabs(row.out[c] - queries.out_at(index * head_dim + c)));
      }
    }
  }
  return largest;
}

inline double tolerance(DType dtype) {
  return dtype == DType::kF32 ? 2e-5 : dtype == DType::kF16 ? 2e-3 : 1.6e-2;
}

}  // namespace skvq::test

// Rows in full precision: sinks and window, 64 tokens at a time, read where they lie.
#pragma once

#include "cpu/softmax_step.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

struct RowTile {
  int count;  // tokens there are
  const char *k[kTileTokens], *v[kTileTokens];
};

// Rows [first, first + 64) of sinks or ring, up to `end`.
inline void find_rows(const CacheView& c, int sequence, int head, bool sinks, int first, int end, RowTile& tile) {
  const char* k = static_cast<const char*>(sinks ? c.sink_k : c.ring_k);
  const char* v = static_cast<const char*>(sinks ? c.sink_v : c.ring_v);
  tile.count = min_int(kTileTokens, end - first);
  for (int t = 0; t < tile.count; ++t) {
    const std::int64_t row = sinks ? c.sink_row(sequence, first + t, head) : c.ring_row(sequence, first + t, head);
    tile.k[t] = k + row * dtype_bytes(c.dtype);
    tile.v[t] = v + row * dtype_bytes(c.dtype);
  }
}

template <DType D>
bool values_are_finite(const RowTile& tile, int head_dim) {
  Floats nan = {};
  for (int t = 0; t < tile.count; ++t) {
    for (int c = 0; c < head_dim; c += kVector) nan += load_as<D>(tile.v[t], c) * 0.0f;
  }
  return sum(nan) == 0.0f;
}

// Rows of one head lie far apart, which processors do not foresee.
template <DType D>
SKVQ_FN void prefetch_row(const char* row, int head_dim) {
  for (int byte = 0; byte < head_dim * dtype_bytes(D); byte += 64) __builtin_prefetch(row + byte);
}

template <DType D, int R>
void row_logits(int head_dim, const RowBlock& block, int row, const RowTile& tile, float s[][kTileTokens]) {
  constexpr int kAhead = 8;
  for (int t = 0; t < min_int(kAhead, tile.count); ++t) prefetch_row<D>(tile.k[t], head_dim);
  for (int t = 0; t < tile.count; ++t) {
    if (t + kAhead < tile.count) prefetch_row<D>(tile.k[t + kAhead], head_dim);
    prefetch_row<D>(tile.v[t], head_dim);  // read next
    Floats dot[R] = {};
    for (int c = 0; c < head_dim; c += kVector) {
      const Floats k = load_as<D>(tile.k[t], c);
      for (int r = 0; r < R; ++r) dot[r] += load(block.q + (row + r) * head_dim + c) * k;
    }
    float sums[R];
    sum_rows(dot, sums);
    for (int r = 0; r < R; ++r) s[r][t] = sums[r];
  }
}

// Sums of weighted values over tokens [begin, end) for R rows and V vectors of channels.
template <DType D, int R, int V>
SKVQ_FN void add_row_channels(RowBlock& block, int row, const RowTile& tile, int head_dim, int channel,
                              TokenRange tokens, const float p[][kTileTokens], const Step<R>& step) {
  Floats acc[R][V] = {};
  for (int t = tokens.begin; t < tokens.end; ++t) {
    Floats value[V];
    for (int i = 0; i < V; ++i) value[i] = load_as<D>(tile.v[t], channel + i * kVector);
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < V; ++i) acc[r][i] += p[r][t] * value[i];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < V; ++i) {
      float* o = block.o + (row + r) * head_dim + channel + i * kVector;
      store(o, load(o) * step.keep[r] + acc[r][i] * step.weight[r]);
    }
  }
}

// R rows against a tile in full precision.
template <DType D, int R>
void attend_rows(const DecodeArgs& a, RowBlock& block, int row, const TokenRange* range, const RowTile& tile) {
  const int head_dim = a.cache.head_dim;
  float s[R][kTileTokens] = {};
  row_logits<D, R>(head_dim, block, row, tile, s);
  const Step<R> step = softmax_step<R>(a, block, row, range, s);
  TokenRange any = {kTileTokens, 0};  // tokens that some row sees
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < kMaxGroups; ++g) block.zeros[(row + r) * kMaxGroups + g] *= step.keep[r];
    if (range[r].begin < range[r].end) {
      any = {min_int(any.begin, range[r].begin), max_int(any.end, range[r].end)};
    }
  }
  int c = 0;
  for (; c + 2 * kVector <= head_dim; c += 2 * kVector) {
    add_row_channels<D, R, 2>(block, row, tile, head_dim, c, any, s, step);
  }
  if (c < head_dim) add_row_channels<D, R, 1>(block, row, tile, head_dim, c, any, s, step);
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

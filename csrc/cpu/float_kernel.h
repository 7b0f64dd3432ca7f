// Logits and weighted values in fp32: rows in full precision, and packed tiles where exactness is asked for or the
// instruction set has no integer kernel.
#pragma once

#include "cpu/tile_values.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// Logits of R rows against 64 tokens in full precision, [token][channel].
template <int R>
void row_logits(int head_dim, const RowBlock& block, int row, const TileValues& tile, float s[][kTileTokens]) {
  for (int t = 0; t < kTileTokens; ++t) {
    const float* k = tile.k + t * head_dim;
    Floats dot[R] = {};
    for (int c = 0; c < head_dim; c += kVector) {
      for (int r = 0; r < R; ++r) dot[r] += load(block.q + (row + r) * head_dim + c) * load(k + c);
    }
    for (int r = 0; r < R; ++r) s[r][t] = sum(dot[r]);
  }
}

// Logits of R rows against the codes of 64 tokens, [token block][channel][16 tokens].
template <int R>
void code_logits(const TensorFormat& format, const RowBlock& block, int row, const TileValues& tile,
                 float s[][kTileTokens]) {
  for (int t = 0; t < kTileTokens; t += 2 * kVector) {
    const float* k0 = tile.k + float_index(Side::kKey, format.head_dim, t, 0);
    const float* k1 = tile.k + float_index(Side::kKey, format.head_dim, t + kVector, 0);
    Floats total[R][2] = {};
    for (int g = 0; g < format.num_groups(); ++g) {
      const Group group = format.group_at(g);
      // Even and odd channels apart: shorter chains of additions, less rounding.
      Floats dot[R][2] = {}, odd[R][2] = {};
      for (int c = group.begin; c < group.end; c += 2) {
        for (int r = 0; r < R; ++r) {
          const float* q = block.q + (row + r) * format.head_dim + c;
          dot[r][0] += q[0] * load(k0 + c * 16);
          odd[r][0] += q[1] * load(k0 + c * 16 + 16);
          dot[r][1] += q[0] * load(k1 + c * 16);
          odd[r][1] += q[1] * load(k1 + c * 16 + 16);
        }
      }
      for (int i = 0; i < 2; ++i) {
        const Floats scale = load(tile.scale[0][g] + t + i * kVector), zero = load(tile.zero[0][g] + t + i * kVector);
        for (int r = 0; r < R; ++r) {
          const float sum_q = block.group_sum[(row + r) * kMaxGroups + g];
          total[r][i] += scale * (dot[r][i] + odd[r][i]) + zero * sum_q;
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      store(s[r] + t, total[r][0]);
      store(s[r] + t + kVector, total[r][1]);
    }
  }
}

// Sums of weighted values over tokens [begin, end) for R rows and V vectors of channels.
template <int R, int V>
SKVQ_FN void weigh_values(const RowBlock& block, int row, const float* values, int head_dim, int channel,
                          TokenRange tokens, const float weight[][kTileTokens], const float* factor,
                          const float* zero) {
  Floats acc[R][V] = {};
  for (int t = tokens.begin; t < tokens.end; ++t) {
    Floats value[V];
    for (int i = 0; i < V; ++i) value[i] = load(values + t * head_dim + channel + i * kVector);
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < V; ++i) acc[r][i] += weight[r][t] * value[i];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < V; ++i) {
      float* o = block.o + (row + r) * head_dim + channel + i * kVector;
      store(o, load(o) * factor[r] + acc[r][i] + zero[r]);
    }
  }
}

// o = o * factor + p V for R rows.
template <int R>
void accumulate(const TensorFormat& format, const RowBlock& block, int row, const TileValues& tile, TokenRange tokens,
                const float p[][kTileTokens], const float* factor) {
  const int groups = tile.quantized ? format.num_groups() : 1;
  for (int g = 0; g < groups; ++g) {
    const Group group = tile.quantized ? format.group_at(g) : Group{0, format.head_dim, 0};
    float weight[R][kTileTokens], zero[R] = {};
    for (int r = 0; r < R; ++r) {
      Floats zeros = {};
      for (int t = 0; t < kTileTokens; t += kVector) {
        const Floats prob = load(p[r] + t);
        store(weight[r] + t, tile.quantized ? prob * load(tile.scale[1][g] + t) : prob);
        // A token that is masked may hold NaN.
        if (tile.quantized) zeros += prob != 0.0f ? prob * load(tile.zero[1][g] + t) : Floats{};
      }
      zero[r] = sum(zeros);
    }
    int c = group.begin;
    for (; c + 2 * kVector <= group.end; c += 2 * kVector) {
      weigh_values<R, 2>(block, row, tile.v, format.head_dim, c, tokens, weight, factor, zero);
    }
    if (c < group.end) weigh_values<R, 1>(block, row, tile.v, format.head_dim, c, tokens, weight, factor, zero);
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

// Logits and weighted values of packed tiles in fp32: codes become floats in registers, less the centre of their range
// so that a sum does not lose its low bits to a constant part. Scales and zeros are applied to sums.
#pragma once

#include "cpu/simd.h"
#include "cpu/softmax_step.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

SKVQ_FN constexpr float code_centre(Code code) {
  return 0.5f * static_cast<float>(traits(code).levels - 1);
}

// The codes of one field of the words of kVector lanes.
template <Code C>
struct Levels {
  static constexpr int kLow = traits(C).plane_bits[0], kHigh = traits(C).plane_bits[1], kPerWord = 32 / kLow;
  float centre;
#if defined(__AVX512F__)
  Floats table = {-centre, 1 - centre, 2 - centre, 3 - centre, -centre, 1 - centre, 2 - centre, 3 - centre,
                  -centre, 1 - centre, 2 - centre, 3 - centre, -centre, 1 - centre, 2 - centre, 3 - centre};
#elif defined(__AVX2__)
  Floats table = {-centre, 1 - centre, 2 - centre, 3 - centre, -centre, 1 - centre, 2 - centre, 3 - centre};
#endif

  // `low` and `high`: the block's bytes in both planes.
  SKVQ_FN Floats at(const std::uint8_t* low, [[maybe_unused]] const std::uint8_t* high, int field, int lane) const {
    const int shift = 8 * (field % 4) + kLow * (field % kPerWord / 4);
    const Ints words = load_words(low + (field / kPerWord * 16 + lane) * 4) >> shift;
#if defined(__AVX512F__)
    if constexpr (kLow == 2 && kHigh == 0) return (Floats)_mm512_permutevar_ps((__m512)table, (__m512i)words);
#elif defined(__AVX2__)
    if constexpr (kLow == 2 && kHigh == 0) return (Floats)_mm256_permutevar_ps((__m256)table, (__m256i)words);
#endif
    Ints code = words & ((1 << kLow) - 1);
    if constexpr (kHigh > 0) code |= single_bits(high + field / 4 * 8, field % 4, lane) << kLow;
    return to_floats(code) - centre;
  }

 private:
  // Bit 4 * i + byte of a mask of 64 bits, for lanes i.
  SKVQ_FN static Ints single_bits(const std::uint8_t* mask, int byte, int lane) {
    std::int32_t half[2];
    std::memcpy(half, mask, sizeof half);
    const Ints first = Ints{} + half[lane / 8], second = Ints{} + half[1];
    const Ints index = lane_index() + lane % 8;
    return ((kVector > 8 ? (index < 8 ? first : second) : first) >> (index % 8 * 4 + byte)) & 1;
  }
};

// Logits of R rows over one group of channels for two vectors of tokens, starting at token t.
template <Code C, int R>
SKVQ_FN void add_exact_logits(const Blocks<C>& blocks, const Levels<C>& levels, const Band& band, const Group& group,
                              const RowBlock& block, int row, int head_dim, int t, Floats (&dot)[R][2]) {
  for (int c = group.begin; c < group.end; c += 16) {
    const int cb = (c - band.begin) / 16;
    const std::uint8_t *low[2], *high[2];
    for (int i = 0; i < 2; ++i) {
      const int tb = (t + i * kVector) / 16;
      low[i] = blocks.low(tb, cb);
      high[i] = blocks.high(tb, cb);
      if ((t + i * kVector) % 16 == 0) blocks.prefetch(tb, cb);
    }
    Floats acc[R][2] = {};  // sums of 16 products: short chains of additions round less
#pragma GCC unroll 16
    for (int f = 0; f < 16; ++f) {
      Floats code[2];
      for (int i = 0; i < 2; ++i) code[i] = levels.at(low[i], high[i], f, (t + i * kVector) % 16);
      for (int r = 0; r < R; ++r) {
        for (int i = 0; i < 2; ++i) acc[r][i] += block.q[(row + r) * head_dim + c + f] * code[i];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 2; ++i) dot[r][i] += acc[r][i];
    }
  }
}

template <Code C, int R>
void exact_band_logits(const TensorFormat& format, int b, const RowBlock& block, int row, const PackedTile& tile,
                       float centre, float s[][kTileTokens]) {
  const Band& band = format.bands[b];
  const Blocks<C> blocks{tile.codes[0][b], Side::kKey, band.channels, tile.ahead};
  const Levels<C> levels{centre};
  for (int t = 0; t < kTileTokens; t += 2 * kVector) {
    for (int g = 0; g < tile.layout[0].num_groups; ++g) {
      const Group& group = tile.layout[0].groups[g];
      if (group.band != b) continue;
      Floats dot[R][2] = {};
      add_exact_logits<C, R>(blocks, levels, band, group, block, row, format.head_dim, t, dot);
      for (int i = 0; i < 2; ++i) {
        const int token = t + i * kVector;
        const Floats scale = load(tile.scale[0][g] + token), zero = load(tile.zero[0][g] + token) + scale * centre;
        for (int r = 0; r < R; ++r) {
          const float sum_q = block.group_sum[(row + r) * kMaxGroups + g];
          store(s[r] + token, load(s[r] + token) + (scale * dot[r][i] + zero * sum_q));
        }
      }
    }
  }
}

// Values of V vectors of channels, starting at channel c, weighed for R rows.
template <Code C, int R, int V>
SKVQ_FN void add_exact_values(const Blocks<C>& blocks, const Levels<C>& levels, const Band& band, RowBlock& block,
                              int row, int head_dim, int c, const float weight[][kTileTokens], const Step<R>& step) {
  Floats acc[R][V] = {};
  for (int tb = 0; tb < Lanes::kBlocks; ++tb) {
    const std::uint8_t *low[V], *high[V];
    for (int i = 0; i < V; ++i) {
      const int channel = c + i * kVector - band.begin;
      low[i] = blocks.low(tb, channel / 16);
      high[i] = blocks.high(tb, channel / 16);
      if (channel % 16 == 0) blocks.prefetch(tb, channel / 16);
    }
#pragma GCC unroll 16
    for (int f = 0; f < 16; ++f) {
      Floats code[V];
      for (int i = 0; i < V; ++i) code[i] = levels.at(low[i], high[i], f, (c + i * kVector) % 16);
      for (int r = 0; r < R; ++r) {
        for (int i = 0; i < V; ++i) acc[r][i] += weight[r][tb * 16 + f] * code[i];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < V; ++i) {
      float* o = block.o + (row + r) * head_dim + c + i * kVector;
      store(o, load(o) * step.keep[r] + acc[r][i] * step.weight[r]);
    }
  }
}

// A token that a row does not see has probability 0 and may hold NaN.
template <Code C, int R>
void exact_group_values(const TensorFormat& format, int g, RowBlock& block, int row, const PackedTile& tile,
                        float centre, const float p[][kTileTokens], const Step<R>& step) {
  const Group& group = tile.layout[1].groups[g];
  const Band& band = format.bands[group.band];
  float weight[R][kTileTokens];
  Floats zeros[R] = {};
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < kTileTokens; t += kVector) {
      const Floats prob = load(p[r] + t), scale = load(tile.scale[1][g] + t);
      const Floats zero = load(tile.zero[1][g] + t) + scale * centre;
      store(weight[r] + t, prob != 0.0f ? prob * scale : Floats{});
      zeros[r] += prob != 0.0f ? prob * zero : Floats{};
    }
  }
  add_zeros<R>(block, row, g, zeros, step, 1.0f);
  const Blocks<C> blocks{tile.codes[1][group.band], Side::kValue, band.channels, tile.ahead};
  const Levels<C> levels{centre};
  int c = group.begin;
  for (; c + 2 * kVector <= group.end; c += 2 * kVector) {
    add_exact_values<C, R, 2>(blocks, levels, band, block, row, format.head_dim, c, weight, step);
  }
  if (c < group.end) add_exact_values<C, R, 1>(blocks, levels, band, block, row, format.head_dim, c, weight, step);
}

// R rows against a packed tile whose codes are bit planes.
template <int R>
void attend_exact(const DecodeArgs& a, RowBlock& block, int row, const TokenRange* range, const PackedTile& tile) {
  const TensorFormat &k = a.cache.format.k, &v = a.cache.format.v;
  float s[R][kTileTokens] = {};
  for (int b = 0; b < k.num_bands; ++b) {
    with_planes(tile.code[0][b],
                [&]<Code C>() { exact_band_logits<C, R>(k, b, block, row, tile, code_centre(k.bands[b].code), s); });
  }
  const Step<R> step = softmax_step<R>(a, block, row, range, s);
  for (int g = 0; g < tile.layout[1].num_groups; ++g) {
    const int b = tile.layout[1].groups[g].band;
    with_planes(tile.code[1][b], [&]<Code C>() {
      exact_group_values<C, R>(v, g, block, row, tile, code_centre(v.bands[b].code), s, step);
    });
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

// Logits and weighted values straight from packed bytes, by byte dot products.
//
// Queries and probabilities are rounded to multiples of a unit per row and group, in one byte or two. One byte serves
// codes of at most 3 bits, whose own error is more than ten times larger; two bytes serve all else (docs/numerics.md
// has the measurement). Sums of products are exact integers.
#pragma once

#include "cpu/simd.h"
#include "cpu/softmax_step.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

inline constexpr int kByteStep = 128;              // value of the lowest bit of a query's high byte
inline constexpr int kTwoBytes = 127 * kByteStep;  // largest magnitude of a query in two bytes
SKVQ_FN constexpr int bytes_for(Code code) {
  return traits(code).levels <= 8 ? 1 : 2;
}

// Whether the integer kernel serves records of this format; the exact kernel serves all.
inline bool integer_kernel_reads(const RecordFormat& format) {
#if SKVQ_HAS_SIMD
  for (const Side side : kSides) {
    const TensorFormat& tensor = format.side(side);
    for (int b = 0; b < tensor.num_bands; ++b) {
      if (!Simd::supports(tensor.bands[b].code)) return false;
    }
  }
  return true;
#else
  (void)format;
  return false;
#endif
}

#if SKVQ_HAS_SIMD

inline constexpr std::int32_t kRounderBits = 0x4b400000;

// One group of a query row: values to bytes, n or 128 * high + low with |low| <= 64; their unit and their sum.
template <int Bytes>
void quantize_group_row(const float* q, int channels, std::int8_t* high, std::int8_t* low, float& unit, float& total) {
  constexpr float kRange = Bytes == 1 ? 127.0f : kTwoBytes;
  Floats top = {}, nan = {}, sums = {};
  for (int c = 0; c < channels; c += kVector) {
    const Floats x = load(q + c), magnitude = x < 0.0f ? -x : x;
    top = magnitude > top ? magnitude : top;
    nan += x * 0.0f;
  }
  const float max = largest(top);
  const bool finite = sum(nan) == 0.0f;
  const float inverse = max > 0.0f && finite ? kRange / max : 0.0f;
  for (int c = 0; c < channels; c += kVector) {
    const Ints n = inverse == 0.0f ? Ints{} : reinterpret_cast<Ints>(load(q + c) * inverse + kRounder) - kRounderBits;
    const Ints h = Bytes == 1 ? n : (n + kByteStep / 2) >> 7;
    Simd::store_bytes(high + c, h);
    if constexpr (Bytes == 2) Simd::store_bytes(low + c, n - h * kByteStep);
    sums += to_floats(n);
  }
  unit = finite ? max / kRange : quiet_nan();
  // The zero is multiplied with the same rounded query as the codes: what is left is the query's error times the
  // dequantized key, which has no constant part.
  total = sum(sums) * unit;
}

inline void quantize_query(const TensorFormat& format, const SideLayout& layout, const float* q, int row,
                           const QuantizedRows& rows) {
  for (int g = 0; g < layout.num_groups; ++g) {
    const Group& group = layout.groups[g];
    const int at = row * format.head_dim + group.begin, unit = row * kMaxGroups + g;
    const auto quantize = bytes_for(format.bands[group.band].code) == 1 ? quantize_group_row<1> : quantize_group_row<2>;
    quantize(q + group.begin, group.end - group.begin, rows.high + at, rows.low + at, rows.unit[unit], rows.sum[unit]);
  }
}

// Sums of R rows and T blocks side by side, as many as registers allow: independent sums keep the multipliers busy.
SKVQ_FN constexpr int blocks_together(int rows) {
  const int together = Simd::kRegisters / (4 * Simd::kPerVector) / rows;
  return together >= 4 ? 4 : together >= 2 ? 2 : 1;
}

// Blocks that a narrow sum takes before it must be widened.
SKVQ_FN constexpr int blocks_per_run(Code code, int coefficient) {
  const int quads = Simd::kNarrowMax / (Simd::kProducts * coefficient * (traits(code).levels - 1));
  return quads >= 4 ? quads / 4 : 1;
}

// What is taken from the codes of V, so that they fit in seven bits and sign.
SKVQ_FN constexpr int code_offset(Code code) {
  return code == Code::kInt8 ? 128 : 0;
}

template <int Bytes, int R, int T>
struct Sums {
  Simd::Sum sum[R][T][Bytes];

  SKVQ_FN Sums() {
    for (auto& row : sum)
      for (auto& block : row)
        for (Simd::Sum& s : block) s = Simd::zero();
  }
  SKVQ_FN void add(const Sums& narrow) {
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < T; ++i)
        for (int b = 0; b < Bytes; ++b) sum[r][i][b] = Simd::widen(sum[r][i][b], narrow.sum[r][i][b]);
  }
  // High and low sums as one number a lane.
  SKVQ_FN void get(int r, int i, float step, Floats (&out)[16 / kVector]) const {
    Simd::to_float(sum[r][i][0], out);
    if constexpr (Bytes == 2) {
      Floats low[16 / kVector];
      Simd::to_float(sum[r][i][1], low);
      for (int n = 0; n < 16 / kVector; ++n) out[n] = out[n] * step + low[n];
    }
  }
};

// Products of R query rows with T blocks of 16 keys over the channels of a group.
template <Code C, int R, int T>
SKVQ_FN void multiply_keys(const Blocks<C>& blocks, const Band& band, const Group& group, const RowBlock& block,
                           int row, int head_dim, int tb, Sums<bytes_for(C), R, T>& sums) {
  constexpr int kBytes = bytes_for(C), kRun = 16 * blocks_per_run(C, 128);
  for (int begin = group.begin; begin < group.end; begin += kRun) {
    Sums<kBytes, R, T> part;
    for (int c = begin; c < min_int(begin + kRun, group.end); c += 16) {
      const int cb = (c - band.begin) / 16;
      for (int i = 0; i < T; ++i) blocks.prefetch(tb + i, cb);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i) {
          const Simd::Codes codes = Simd::quad<C>(blocks.low(tb + i, cb), blocks.high(tb + i, cb), q);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const int at = (row + r) * head_dim + c + 4 * q;
            Simd::add(part.sum[r][i][0], codes, block.q8.high + at);
            if constexpr (kBytes == 2) Simd::add(part.sum[r][i][1], codes, block.q8.low + at);
          }
        }
      }
    }
    sums.add(part);
  }
}

template <Code C, int R>
void integer_band_logits(const TensorFormat& format, int b, const RowBlock& block, int row, const PackedTile& tile,
                         float (*s)[kTileTokens]) {
  constexpr int T = blocks_together(R * bytes_for(C));
  const Band& band = format.bands[b];
  const Blocks<C> blocks{tile.codes[0][b], Side::kKey, band.channels, tile.ahead};
  for (int g = 0; g < tile.layout[0].num_groups; ++g) {
    const Group& group = tile.layout[0].groups[g];
    if (group.band != b) continue;
    float unit[R], total[R];
    for (int r = 0; r < R; ++r) {
      unit[r] = block.q8.unit[(row + r) * kMaxGroups + g];
      total[r] = block.q8.sum[(row + r) * kMaxGroups + g];
    }
    for (int tb = 0; tb < Lanes::kBlocks; tb += T) {
      Sums<bytes_for(C), R, T> sums;
      multiply_keys<C, R, T>(blocks, band, group, block, row, format.head_dim, tb, sums);
      for (int r = 0; r < R; ++r) {
        for (int i = 0; i < T; ++i) {
          Floats dot[16 / kVector];
          sums.get(r, i, kByteStep, dot);
          for (int n = 0; n < 16 / kVector; ++n) {
            const int t = (tb + i) * 16 + n * kVector;
            const Floats logit = load(tile.scale[0][g] + t) * (dot[n] * unit[r]) + load(tile.zero[0][g] + t) * total[r];
            store(s[r] + t, load(s[r] + t) + logit);
          }
        }
      }
    }
  }
}

// Probabilities times the scales of V as unsigned bytes, n or 256 * high + low, per row and group.
template <int Bytes, int R>
struct Weights {
  std::uint8_t high[R][kTileTokens], low[R][kTileTokens];
  float unit;  // one for all rows, because 1 is among the probabilities of each

  SKVQ_FN Weights(const PackedTile& tile, int g, int offset, RowBlock& block, int row, const float (*p)[kTileTokens],
                  const Step<R>& step) {
    constexpr float kRange = Bytes == 1 ? 255.0f : 65535.0f;
    constexpr int kVectors = kTileTokens / kVector;
    Floats top = {}, levels[kVectors], ratio[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      levels[i] = load(tile.scale[1][g] + i * kVector);
      top = levels[i] > top ? levels[i] : top;
      // Multiplied with the rounded weights, so that codes and zeros are weighed alike.
      ratio[i] = load(tile.zero[1][g] + i * kVector) / levels[i] + static_cast<float>(offset);
    }
    const float max = largest(top), inverse = kRange / max;
    for (Floats& level : levels) level *= inverse;
    unit = max / kRange;
    Floats zeros[R] = {};
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < kVectors; ++i) {
        const Floats shifted = load(p[r] + i * kVector) * levels[i] + kRounder;
        zeros[r] += (shifted - kRounder) * ratio[i];
        const Ints n = reinterpret_cast<Ints>(shifted);  // its low bytes are the number
        Simd::store_bytes(high[r] + i * kVector, Bytes == 1 ? n : n >> 8);
        if constexpr (Bytes == 2) Simd::store_bytes(low[r] + i * kVector, n);
      }
    }
    add_zeros<R>(block, row, g, zeros, step, unit);
  }
};

// Products of R rows of weights with T blocks of 16 channels.
template <Code C, int R, int T>
SKVQ_FN void multiply_values(const Blocks<C>& blocks, int cb, const Weights<bytes_for(C), R>& weights,
                             Sums<bytes_for(C), R, T>& sums) {
  constexpr int kBytes = bytes_for(C), kRun = blocks_per_run(C, 255);
  [[maybe_unused]] Simd::Codes trits[T][16];
  if constexpr (is_base3(C)) {
    for (int i = 0; i < T; ++i) {
      const std::uint8_t* in = blocks.codes + (cb + i) * Lanes::kTernaryBlockBytes;
      for (int line = 0; line < Lanes::kTernaryBlockBytes; line += 64) __builtin_prefetch(in + blocks.ahead + line);
      Simd::ternary_quads(in, trits[i]);
    }
  }
  for (int begin = 0; begin < Lanes::kBlocks; begin += kRun) {
    Sums<kBytes, R, T> part;
    for (int tb = begin; tb < min_int(begin + kRun, Lanes::kBlocks); ++tb) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i) {
          Simd::Codes codes;
          if constexpr (is_base3(C)) {
            codes = trits[i][tb * 4 + q];
          } else {
            if (q == 0) blocks.prefetch(tb, cb + i);
            codes = Simd::quad<C>(blocks.low(tb, cb + i), blocks.high(tb, cb + i), q);
          }
          codes = Simd::less_offset<C>(codes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            Simd::add(part.sum[r][i][0], codes, weights.high[r] + tb * 16 + q * 4);
            if constexpr (kBytes == 2) Simd::add(part.sum[r][i][1], codes, weights.low[r] + tb * 16 + q * 4);
          }
        }
      }
    }
    sums.add(part);
  }
}

// `o`: the outputs of R rows, for the channels of T blocks. Factors by value, so that no store can change them.
template <Code C, int R, int T>
SKVQ_FN void add_integer_values(const Blocks<C>& blocks, int cb, const Weights<bytes_for(C), R>& weights,
                                const Step<R> factors, float* const (&o)[R], int c) {
  Sums<bytes_for(C), R, T> sums;
  multiply_values<C, R, T>(blocks, cb, weights, sums);
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < T; ++i) {
      Floats dot[16 / kVector];
      sums.get(r, i, 256.0f, dot);
      for (int n = 0; n < 16 / kVector; ++n) {
        float* lanes = o[r] + c + i * 16 + n * kVector;
        store(lanes, load(lanes) * factors.keep[r] + dot[n] * factors.weight[r]);
      }
    }
  }
}

template <Code C, int R>
void integer_group_values(const TensorFormat& format, int g, RowBlock& block, int row, const PackedTile& tile,
                          const float (*p)[kTileTokens], const Step<R>& step) {
  constexpr int T = blocks_together(R * bytes_for(C));
  const Group& group = tile.layout[1].groups[g];
  const Band& band = format.bands[group.band];
  const Blocks<C> blocks{tile.codes[1][group.band], Side::kValue, band.channels, tile.ahead};
  const Weights<bytes_for(C), R> weights(tile, g, code_offset(C), block, row, p, step);
  Step<R> factors = step;
  float* o[R];
  for (int r = 0; r < R; ++r) {
    factors.weight[r] *= weights.unit;
    o[r] = block.o + (row + r) * format.head_dim;
  }
  int c = group.begin;
  for (; c + 16 * T <= group.end; c += 16 * T) {
    add_integer_values<C, R, T>(blocks, (c - band.begin) / 16, weights, factors, o, c);
  }
  for (; c < group.end; c += 16) add_integer_values<C, R, 1>(blocks, (c - band.begin) / 16, weights, factors, o, c);
}

// R rows against a packed tile.
template <int R>
void attend_integer(const DecodeArgs& a, RowBlock& block, int row, const TokenRange* range, const PackedTile& tile) {
  const TensorFormat &k = a.cache.format.k, &v = a.cache.format.v;
  float s[R][kTileTokens] = {};
  for (int b = 0; b < k.num_bands; ++b) {
    with_planes(tile.code[0][b], [&]<Code C>() {
      if constexpr (Simd::supports(C)) integer_band_logits<C, R>(k, b, block, row, tile, s);
    });
  }
  const Step<R> step = softmax_step<R>(a, block, row, range, s);
  for (int g = 0; g < tile.layout[1].num_groups; ++g) {
    const Code code = tile.code[1][tile.layout[1].groups[g].band];
    if (is_base3(code)) {
      integer_group_values<Code::kTernary, R>(v, g, block, row, tile, s, step);
    } else {
      with_planes(code, [&]<Code C>() {
        if constexpr (Simd::supports(C)) integer_group_values<C, R>(v, g, block, row, tile, s, step);
      });
    }
  }
}

#endif

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

// Logits and weighted values straight from packed bytes, by byte dot products.
//
// Queries and probabilities are rounded to multiples of a unit per row and group, in one byte or two. One byte (7 bits
// and sign) serves queries against keys of at most 3 bits, whose own error is more than ten times larger; two bytes (14
// bits and sign) serve all else (docs/numerics.md has the measurement). Sums of products are exact integers.
#pragma once

#include "cpu/simd.h"
#include "cpu/tile_values.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

inline constexpr int kByteStep = 128;              // value of the high byte's lowest bit
inline constexpr int kTwoBytes = 127 * kByteStep;  // largest magnitude in two bytes
SKVQ_FN constexpr int bytes_for(Code code) {
  return traits(code).levels <= 8 ? 1 : 2;
}

// Whether the integer kernel serves records of this format; the exact kernel serves all.
inline bool integer_kernel_reads(const RecordFormat& format) {
#if SKVQ_HAS_SIMD
  bool reads = format.arrangement == ArrangementKind::kLanes;
  for (int b = 0; b < format.k.num_bands; ++b) {
    reads = reads && !is_base3(format.k.bands[b].code) && Simd::supports(format.k.bands[b].code);
  }
  for (int b = 0; b < format.v.num_bands; ++b) reads = reads && Simd::supports(format.v.bands[b].code);
  return reads;
#else
  (void)format;
  return false;
#endif
}

#if SKVQ_HAS_SIMD

// n in one byte, or as 128 * high + low with |low| <= 64.
template <int Bytes>
SKVQ_FN void store_rounded(Ints n, std::int8_t* high, std::int8_t* low) {
  if constexpr (Bytes == 1) {
    Simd::store_bytes(high, n);
  } else {
    const Ints h = (n + kByteStep / 2) >> 7;
    Simd::store_bytes(high, h);
    Simd::store_bytes(low, n - h * kByteStep);
  }
}

template <int Bytes>
inline constexpr float kByteRange = Bytes == 1 ? 127.0f : kTwoBytes;

// To the nearest integer; |x| < 2^22.
SKVQ_FN Ints round_to_int(Floats x) {
  return reinterpret_cast<Ints>(x + 12582912.0f) - 0x4b400000;
}

// One group of a query row: values to bytes, their unit and their sum.
template <int Bytes>
void quantize_group_row(const float* q, int channels, std::int8_t* high, std::int8_t* low, float& unit, float& total) {
  Floats top = {}, nan = {}, sums = {};
  for (int c = 0; c < channels; c += kVector) {
    const Floats x = load(q + c), magnitude = x < 0.0f ? -x : x;
    top = magnitude > top ? magnitude : top;
    nan += x * 0.0f;
  }
  const float max = largest(top);
  const bool finite = sum(nan) == 0.0f;
  const float inverse = max > 0.0f && finite ? kByteRange<Bytes> / max : 0.0f;
  for (int c = 0; c < channels; c += kVector) {
    const Ints n = inverse == 0.0f ? Ints{} : round_to_int(load(q + c) * inverse);
    sums += __builtin_convertvector(n, Floats);
    store_rounded<Bytes>(n, high + c, low + c);
  }
  unit = finite ? max / kByteRange<Bytes> : quiet_nan();
  // The zero is multiplied with the same rounded query as the codes: what is left is the query's error times the
  // dequantized key, which has no constant part.
  total = sum(sums) * unit;
}

inline void quantize_query(const TensorFormat& format, const float* q, int row, const QuantizedRows& rows) {
  for (int g = 0; g < format.num_groups(); ++g) {
    const Group group = format.group_at(g);
    const int at = row * format.head_dim + group.begin, unit = row * kMaxGroups + g;
    with_code(format.bands[group.band].code, [&]<Code C>() {
      quantize_group_row<bytes_for(C)>(q + group.begin, group.end - group.begin, rows.high + at, rows.low + at,
                                       rows.unit[unit], rows.sum[unit]);
    });
  }
}

inline constexpr int kPerBlock = 16 / kVector;  // vectors in the 16 lanes of a block

// High and low sums of a block as one number a lane.
template <int Bytes>
SKVQ_FN void weigh_bytes(const Simd::Sum (&sums)[Bytes], Floats (&out)[kPerBlock]) {
  Simd::to_float(sums[0], out);
  if constexpr (Bytes == 2) {
    Floats low[kPerBlock];
    Simd::to_float(sums[1], low);
    for (int n = 0; n < kPerBlock; ++n) out[n] = out[n] * static_cast<float>(kByteStep) + low[n];
  }
}

SKVQ_FN int first_group(const TensorFormat& format, int band) {
  return band == 0 ? 0 : format.band_groups(0);
}

template <Code C, int R>
void add_logits(const TensorFormat& format, int band_index, const RowBlock& block, int row, const TileValues& tile,
                const std::uint8_t* codes, float (*s)[kTileTokens]) {
  constexpr int kBytes = bytes_for(C), kTogether = 2;  // blocks of tokens side by side: enough independent sums
  const Band& band = format.bands[band_index];
  const int end = first_group(format, band_index) + format.band_groups(band_index);
  for (int tb = 0; tb < Lanes::kBlocks; tb += kTogether) {
    for (int g = first_group(format, band_index); g < end; ++g) {
      const Group group = format.group_at(g);
      Simd::Sum sums[R][kTogether][kBytes];
      for (int i = 0; i < R * kTogether * kBytes; ++i) (&sums[0][0][0])[i] = Simd::zero();
      for (int c = group.begin; c < group.end; c += 16) {
        for (int i = 0; i < kTogether; ++i) {
          Simd::Codes quads[4];
          load_block<C>(Side::kKey, band.channels, tb + i, (c - band.begin) / 16, codes, tile.ahead, quads);
          for (int r = 0; r < R; ++r) {
            const int at = (row + r) * format.head_dim + c;
            sums[r][i][0] = Simd::dot(sums[r][i][0], quads, block.q8.high + at);
            if constexpr (kBytes == 2) sums[r][i][1] = Simd::dot(sums[r][i][1], quads, block.q8.low + at);
          }
        }
      }
      for (int i = 0; i < kTogether; ++i) {
        for (int r = 0; r < R; ++r) {
          Floats dot[kPerBlock];
          weigh_bytes<kBytes>(sums[r][i], dot);
          const float unit = block.q8.unit[(row + r) * kMaxGroups + g], sum = block.q8.sum[(row + r) * kMaxGroups + g];
          for (int n = 0; n < kPerBlock; ++n) {
            const int t = (tb + i) * 16 + n * kVector;
            store(s[r] + t,
                  load(s[r] + t) + load(tile.scale[0][g] + t) * (dot[n] * unit) + load(tile.zero[0][g] + t) * sum);
          }
        }
      }
    }
  }
}

template <int R>
void add_band_logits(const RecordFormat& format, int b, const RowBlock& block, int row, const TileValues& tile,
                     const std::uint8_t* record, float (*s)[kTileTokens]) {
  const std::uint8_t* codes = record + format.band_offset(Side::kKey, b);
  with_code(format.k.bands[b].code, [&]<Code C>() {
    if constexpr (!is_base3(C)) add_logits<C, R>(format.k, b, block, row, tile, codes, s);
  });
}

// Probabilities times the scale of V, rounded per row and group, and the rounded weights' sums with the zeros.
template <int R>
struct Weights {
  std::int8_t high[R][kTileTokens], low[R][kTileTokens];
  float unit[R], zero[R];

  template <int Bytes>
  SKVQ_FN void set(const TileValues& tile, int g, const float (*p)[kTileTokens]) {
    for (int r = 0; r < R; ++r) {
      Floats weight[kTileTokens / kVector], top = {}, zeros = {};
      for (int i = 0; i < kTileTokens / kVector; ++i) {
        weight[i] = load(p[r] + i * kVector) * load(tile.scale[1][g] + i * kVector);
        top = weight[i] > top ? weight[i] : top;
      }
      const float max = largest(top);
      const float inverse = max > 0.0f ? kByteRange<Bytes> / max : 0.0f;
      for (int i = 0; i < kTileTokens / kVector; ++i) {
        const Ints n = round_to_int(weight[i] * inverse);
        zeros += __builtin_convertvector(n, Floats) * load(tile.zero[1][g] + i * kVector);
        store_rounded<Bytes>(n, high[r] + i * kVector, low[r] + i * kVector);
      }
      unit[r] = max / kByteRange<Bytes>;
      zero[r] = sum(zeros) * unit[r];
    }
  }
};

template <Code C, int R>
void add_group_values(const TensorFormat& format, const Band& band, const Group& group, const RowBlock& block, int row,
                      const Weights<R>& w, const std::uint8_t* codes, std::ptrdiff_t ahead, const float* factor) {
  constexpr int kBytes = bytes_for(C);
  for (int c = group.begin; c < group.end; c += 16) {
    const int cb = (c - band.begin) / 16;
    // Two sums a row: of the high and the low bytes, or of every other block where there is one byte.
    Simd::Sum sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = Simd::zero();
    const auto add = [&](int tb, const Simd::Codes(&quads)[4]) {
      for (int r = 0; r < R; ++r) {
        Simd::Sum& high = sums[r][kBytes == 1 ? tb % 2 : 0];
        high = Simd::dot(high, quads, w.high[r] + tb * 16);
        if constexpr (kBytes == 2) sums[r][1] = Simd::dot(sums[r][1], quads, w.low[r] + tb * 16);
      }
    };
    if constexpr (is_base3(C)) {
      Simd::Codes quads[4][4];
      for (int line = 0; line < Lanes::kTernaryBlockBytes; line += 64) {
        __builtin_prefetch(codes + cb * Lanes::kTernaryBlockBytes + ahead + line);
      }
      Simd::ternary_blocks(codes + cb * Lanes::kTernaryBlockBytes, *reinterpret_cast<Simd::Codes(*)[16]>(&quads));
      for (int tb = 0; tb < Lanes::kBlocks; ++tb) add(tb, quads[tb]);
    } else {
      for (int tb = 0; tb < Lanes::kBlocks; ++tb) {
        Simd::Codes quads[4];
        load_block<C>(Side::kValue, band.channels, tb, cb, codes, ahead, quads);
        add(tb, quads);
      }
    }
    for (int r = 0; r < R; ++r) {
      float* o = block.o + (row + r) * format.head_dim + c;
      Floats dot[kPerBlock];
      if constexpr (kBytes == 1) {
        Simd::to_float(Simd::add(sums[r][0], sums[r][1]), dot);
      } else {
        weigh_bytes<2>(sums[r], dot);
      }
      for (int n = 0; n < kPerBlock; ++n) {
        float* lanes = o + n * kVector;
        store(lanes, load(lanes) * factor[r] + dot[n] * w.unit[r] + w.zero[r]);
      }
    }
  }
}

template <int R>
void add_values(const RecordFormat& format, const RowBlock& block, int row, const TileValues& tile,
                const std::uint8_t* record, const float (*p)[kTileTokens], const float* factor) {
  for (int g = 0; g < format.v.num_groups(); ++g) {
    const Group group = format.v.group_at(g);
    const Band& band = format.v.bands[group.band];
    const std::uint8_t* codes = record + format.band_offset(Side::kValue, group.band);
    with_code(band.code, [&]<Code C>() {
      Weights<R> weights;
      weights.template set<bytes_for(C)>(tile, g, p);
      add_group_values<C, R>(format.v, band, group, block, row, weights, codes, tile.ahead, factor);
    });
  }
}

#endif

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

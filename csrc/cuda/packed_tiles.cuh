// Attention over packed tiles: 64 tokens of one KV head against eight query rows, in tensor-core products of codes.
//
// S^T = K q^T and O^T += V^T P^T, codes as the A operand. Scale and zero are not applied to codes: with key = code *
// scale + zero, q . key = scale * (q . code) + zero * (sum of q over the group), per token; and the scale of a value
// goes into its probability, its zero into a sum per group that is added at the end.
#pragma once

#include "cuda/columns.cuh"
#include "cuda/operands.cuh"
#include "cuda/sums.cuh"

namespace skvq::cuda {

// Readers of the one or two bands of one side.
template <class T, Side S>
struct SideReader {
  static constexpr TensorFormat kFormat = S == Side::kKey ? T::kKey : T::kValue;
  static constexpr Band kFirst = kFormat.bands[0], kSecond = kFormat.bands[kFormat.num_bands - 1];
  static constexpr int kSecondOffset = kFormat.num_bands == 2 ? tile_code_bytes(kFirst.code, kFirst.channels) : 0;

  BandReader<kFirst.code, kFirst.channels> first;
  BandReader<kSecond.code, kSecond.channels> second;

  SKVQ_DEVICE SideReader(const unsigned char* codes, int lane)
      : first{codes, lane}, second{codes + kSecondOffset, lane} {}

  // Tokens 16 * Step to 16 * Step + 15 of block `Block` of 16 channels of the head.
  template <int Step, int Block>
  SKVQ_DEVICE void read(std::uint32_t (&a)[4]) {
    constexpr int in_second = Block - kSecond.begin / 16;
    if constexpr (kFormat.num_bands == 2 && in_second >= 0) {
      second.template read<Step*(kSecond.channels / 16) + in_second>(a);
    } else {
      first.template read<Step*(kFirst.channels / 16) + Block>(a);
    }
  }
};

// Bit at which the codes of a block lie in the operand (operands.cuh).
template <class T, Side S>
SKVQ_FN constexpr int block_bit(int block) {
  const TensorFormat& f = S == Side::kKey ? T::kKey : T::kValue;
  const Band& band = f.num_bands == 2 && block * 16 >= f.bands[1].begin ? f.bands[1] : f.bands[0];
  return operand_bit(band.code, block - band.begin / 16);
}

// Scale and zero of tokens l / 4 and l / 4 + 8 of a step.
struct TokenMeta {
  ptx::Floats2 low, high;  // .low is the scale, .high the zero
};

// They are asked for step by step and group by group, as they lie (Mma::meta); four come with one load, or two of fp16.
template <int Groups>
struct MetaReader {
  const unsigned char* mine;  // what this lane's rows need
  bool fp16;
  std::uint32_t low[4] = {}, high[4] = {};  // halves: scale and zero of four pairs of tokens

  SKVQ_DEVICE MetaReader(const unsigned char* section, bool is_fp16, int lane)
      : mine(section + Mma::meta(Groups, lane / 4, 0, 0) * (is_fp16 ? 2 : 1)), fp16(is_fp16) {}

  template <int Step, int Group>
  SKVQ_DEVICE TokenMeta read() {
    constexpr int index = Mma::meta(Groups, Step * kStepTokens, Group, 0);  // four numbers of a lane are one index
    if constexpr (index % 16 == 0) load(index);
    return {ptx::unpack_f16(low[index / 4 % 4]), ptx::unpack_f16(high[index / 4 % 4])};
  }

 private:
  SKVQ_DEVICE void load(int index) {
    if (fp16) {
      const uint4 a = *reinterpret_cast<const uint4*>(mine + index * 2);
      const uint4 b = *reinterpret_cast<const uint4*>(mine + index * 2 + 16);
      low[0] = a.x, high[0] = a.y, low[1] = a.z, high[1] = a.w;
      low[2] = b.x, high[2] = b.y, low[3] = b.z, high[3] = b.w;
      return;
    }
    const uint4 m = *reinterpret_cast<const uint4*>(mine + index);
    const std::uint32_t pairs[4] = {m.x, m.y, m.z, m.w};
    unroll<4>([&](auto i) {
      low[i] = ptx::unpack_e4m3(pairs[i] & 0xffffu);
      high[i] = ptx::unpack_e4m3(pairs[i] >> 16);
    });
  }
};

// Numbers of the eight columns that are read once a tile, in shared memory because registers are dear.
template <class T>
struct alignas(16) QueryNumbers {
  float sums[T::kKeyGroups][kColumns];  // of a query over the channels of a group, in units of zero / scale
  float units[kColumns];                // of a product with codes, in units of log 2; positive

  // Of the two columns of this lane's accumulators.
  SKVQ_DEVICE static float2 pair(const float (&of_columns)[kColumns]) {
    return *reinterpret_cast<const float2*>(of_columns + lane_index() % 4 * 2);
  }
};

// Queries as the B operand of the products with codes. A query is multiplied by a power of two of its own, so that fp16
// holds it exactly, and by one for each block that undoes the bit at which codes lie.
template <class T>
struct PackedQueries {
  static constexpr int kTopExponent = 6;  // of the largest component, before it grows by kHighestBit
  static constexpr int kHighestBit = 8;   // largest operand_bit

  std::uint32_t b[T::kBlocks][2];
};

SKVQ_DEVICE ptx::Floats2 unpack_row(DType dtype, std::uint32_t pair) {
  return dtype == DType::kBf16 ? ptx::unpack_bf16(pair) : ptx::unpack_f16(pair);
}

// By all lanes of the warp.
template <class T>
SKVQ_DEVICE void load_queries(const DecodeArgs& a, const Item& item, ColumnSpan span, QueryNumbers<T>& numbers,
                              PackedQueries<T>& q) {
  const QueryReader reader(a, item, span);
  const int channel = lane_index() % 4 * 2, column = lane_index() / 4;
  float largest = 0.0f;
  unroll<T::kBlocks>([&](auto block) {
    unroll<2>([&](auto half) {
      q.b[block][half] = reader.pair(block * 16 + channel + half * 8);
      const ptx::Floats2 x = unpack_row(a.q_dtype, q.b[block][half]);
      largest = fmaxf(largest, fmaxf(fabsf(x.low), fabsf(x.high)));
    });
  });
  for (int distance = 1; distance < 4; distance *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  const int exponent = static_cast<int>(float_bits(largest) >> 23) - 127;
  const bool ordinary = largest > 0.0f && exponent < 128;
  const int grow = ordinary ? min_int(120, PackedQueries<T>::kTopExponent - exponent) : 0;
  const Exponents e = a.cache.exponents_of(Side::kKey, item.head);
  // A negative scale goes into the queries, so that logits keep the order of the products; so does 0.
  const float sign = a.softmax_scale < 0.0f ? -1.0f : a.softmax_scale > 0.0f ? 1.0f : 0.0f;
  const float factor = sign * power_of_two(grow);
  constexpr int kOperand = PackedQueries<T>::kHighestBit + kOperandExponent;
  unroll<T::kKeyGroups>([&](auto g) {
    constexpr Group group = T::kKey.group_at(g);
    float sum = 0.0f;
    unroll<(group.end - group.begin) / 16>([&](auto j) {
      constexpr int block = group.begin / 16 + j;
      const float lift = factor * power_of_two(PackedQueries<T>::kHighestBit - block_bit<T, Side::kKey>(block));
      unroll<2>([&](auto half) {
        const ptx::Floats2 x = unpack_row(a.q_dtype, q.b[block][half]);
        sum += x.low + x.high;
        q.b[block][half] = ptx::pack_f16(x.low * lift, x.high * lift);
      });
    });
    for (int distance = 1; distance < 4; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (channel == 0) {
      numbers.sums[g][column] = sum * factor * power_of_two(kOperand) * power_of_two(e.zero - e.scale);
    }
  });
  const float scale = fabsf(a.softmax_scale) * kLog2e * power_of_two(-kOperand) * power_of_two(e.scale);
  if (channel == 0) {
    numbers.units[column] = sign == 0.0f ? 1.0f : larger(power_of_two(-grow) * scale, 0x1p-120f);
  }
  __syncwarp();
}

// Logits of one tile in the units of the queries, [step][accumulator].
template <class T>
SKVQ_DEVICE void tile_logits(const DecodeParams& p, const PackedQueries<T>& q, const QueryNumbers<T>& numbers,
                             const unsigned char* record, bool fp16, float (&s)[Mma::kSteps][4]) {
  const int lane = lane_index();
  SideReader<T, Side::kKey> codes(record, lane);
  MetaReader<T::kKeyGroups> metas(record + p.k_meta_offset, fp16, lane);
  unroll<Mma::kSteps>([&](auto step) {
    unroll<T::kKeyGroups>([&](auto g) {
      constexpr Group group = T::kKey.group_at(g);
      float product[4] = {};
      unroll<(group.end - group.begin) / 16>([&](auto j) {
        constexpr int block = group.begin / 16 + j;
        std::uint32_t a[4];
        codes.template read<step, block>(a);
        ptx::mma_f16(product, a, q.b[block][0], q.b[block][1]);
      });
      const TokenMeta meta = metas.template read<step, g>();
      const float2 sums = numbers.pair(numbers.sums[g]);
      unroll<4>([&](auto i) {
        const ptx::Floats2 m = i < 2 ? meta.low : meta.high;
        const float before = g == 0 ? 0.0f : s[step][i];
        const float sum = i % 2 == 0 ? sums.x : sums.y;
        const float zero = g == 0 ? m.high * sum : fmaf(m.high, sum, before);
        s[step][i] = fmaf(product[i], m.low, zero);
      });
    });
  });
}

// A tile at a border, or logits that are transformed: what a column must not see becomes minus infinity, and scales and
// zeros of tokens that no column sees become 0, so that a NaN among them touches nothing.
template <class T>
SKVQ_DEVICE void restrict_tile(const DecodeParams& p, const ColumnView* views, int columns, float2 unit, int position,
                               unsigned char* record, bool fp16, float (&s)[Mma::kSteps][4]) {
  const int lane = lane_index();
#pragma unroll 1
  for (int t = lane; t < kTileTokens; t += kWarp) {
    bool seen = false;
#pragma unroll 1
    for (int c = 0; c < columns; ++c) {
      seen |= position + t >= views[c].begin && position + t < min_int(views[c].end, views[c].packed_end);
    }
#pragma unroll 1
    for (int at = 0; at < 2 * T::kValueGroups && !seen; ++at) {
      store_meta(fp16 ? Meta::kFp16 : Meta::kE4m3, record + p.v_meta_offset,
                 Mma::meta(T::kValueGroups, t, at / 2, at % 2), 0);
    }
  }
  // A rolled loop over logits that move up by one each time: it seldom runs, and its code must not crowd the others'.
  const bool transforms = transforms_logits(p.args);
#pragma unroll 1
  for (int i = 0; i < Mma::kSteps * 4; ++i) {
    const ColumnView view = views[lane % 4 * 2 + i % 2];
    const float of_log2 = i % 2 == 0 ? unit.x : unit.y;
    const int at = position + i / 4 * kStepTokens + lane / 4 + i / 2 % 2 * 8;
    float logit = s[0][0];
    if (transforms) logit = transform_logit(p.args, logit * of_log2, view.shift) * ptx::reciprocal(of_log2);
    if (at < view.begin || at >= min_int(view.end, view.packed_end)) logit = minus_infinity();
    unroll<Mma::kSteps * 4 - 1>([&](auto j) { s[j / 4][j % 4] = s[(j + 1) / 4][(j + 1) % 4]; });
    s[Mma::kSteps - 1][3] = logit;
  }
  __syncwarp();
}

// Probabilities of a tile times its values, onto the sums.
template <class T>
SKVQ_DEVICE void tile_values(const DecodeParams& p, const float (&s)[Mma::kSteps][4], float2 unit,
                             const unsigned char* record, bool fp16, Sums<T>& sums,
                             float (&zeros)[T::kValueGroups][2]) {
  const int lane = lane_index();
  SideReader<T, Side::kValue> codes(record + p.v_codes_offset, lane);
  MetaReader<T::kValueGroups> metas(record + p.v_meta_offset, fp16, lane);
  unroll<Mma::kSteps>([&](auto step) {
    float probability[4];
    unroll<4>([&](auto i) {
      probability[i] = ptx::ex2(fmaf(s[step][i], i % 2 == 0 ? unit.x : unit.y, -sums.reference[i % 2]));
    });
    sums.denominator[0] += probability[0] + probability[2];
    sums.denominator[1] += probability[1] + probability[3];
    unroll<T::kValueGroups>([&](auto g) {
      constexpr Group group = T::kValue.group_at(g);
      const TokenMeta meta = metas.template read<step, g>();
      unroll<2>([&](auto column) {
        zeros[g][column] = fmaf(probability[column], meta.low.high, zeros[g][column]);
        zeros[g][column] = fmaf(probability[2 + column], meta.high.high, zeros[g][column]);
      });
      const float low = meta.low.low, high = meta.high.low;
      const std::uint32_t b0 = ptx::transpose_8x8(ptx::pack_f16(probability[0] * low, probability[1] * low));
      const std::uint32_t b1 = ptx::transpose_8x8(ptx::pack_f16(probability[2] * high, probability[3] * high));
      unroll<(group.end - group.begin) / 16>([&](auto j) {
        constexpr int block = group.begin / 16 + j;
        std::uint32_t a[4];
        codes.template read<step, block>(a);
        ptx::mma_f16(sums.out[block], a, b0, b1);
      });
    });
  });
}

// Sums of codes become sums of values.
template <class T>
SKVQ_DEVICE void apply_value_units(const CacheView& c, int head, Sums<T>& sums, float (&zeros)[T::kValueGroups][2]) {
  const Exponents e = c.exponents_of(Side::kValue, head);
  const float zero_unit = power_of_two(e.zero), scale_unit = power_of_two(e.scale);
  unroll<T::kValueGroups>([&](auto g) {
    constexpr Group group = T::kValue.group_at(g);
    float zero[2];
    unroll<2>([&](auto column) { zero[column] = sum_of_column(zeros[g][column]) * zero_unit; });
    unroll<(group.end - group.begin) / 16>([&](auto j) {
      constexpr int block = group.begin / 16 + j;
      constexpr int exponent = -block_bit<T, Side::kValue>(block) - kOperandExponent;
      unroll<4>([&](auto i) {
        sums.out[block][i] = fmaf(sums.out[block][i], power_of_two(exponent) * scale_unit, zero[i % 2]);
      });
    });
  });
}

}  // namespace skvq::cuda

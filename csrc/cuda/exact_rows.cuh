// Attention over sinks and window: rows in full precision, 16 tokens at a time, against eight query rows.
#pragma once

#include "cuda/columns.cuh"
#include "cuda/sums.cuh"

namespace skvq::cuda {

// 16 rows of one side in shared memory. Chunks of 16 bytes are exchanged by the row's low bits, so that the eight rows
// that an ldmatrix reads lie in different banks.
template <class T>
SKVQ_FN constexpr int chunk_offset(int row, int chunk) {
  return (row * (T::kHeadDim / 8) + (chunk ^ (row & 7))) * 16;
}

// Step `index` of an item: sinks first, then window.
struct RowStep {
  int position;  // of the first token
  int end;       // first position that is not read
  bool sinks;
};
SKVQ_DEVICE RowStep row_step(const SequenceWork& w, int index) {
  const int sink_steps = SequenceWork::steps_of(w.sinks);
  if (index < sink_steps) return {w.sinks.begin + index * kStepTokens, w.sinks.end, true};
  return {w.window.begin + (index - sink_steps) * kStepTokens, w.window.end, false};
}

// Starts to bring the rows of a step; rows that are not there become 0.
template <class T, Side S>
SKVQ_DEVICE void copy_rows(const CacheView& c, const Item& item, const RowStep& step, unsigned char* to) {
  constexpr int chunks = T::kHeadDim / 8;
  const auto* sink = static_cast<const unsigned char*>(S == Side::kKey ? c.sink_k : c.sink_v);
  const auto* ring = static_cast<const unsigned char*>(S == Side::kKey ? c.ring_k : c.ring_v);
  for (int i = lane_index(); i < kStepTokens * chunks; i += kWarp) {
    const int row = i / chunks, chunk = i % chunks, position = step.position + row;
    const bool there = position < step.end;
    const int source = there ? position : step.position;
    const unsigned char* from = step.sinks ? sink + c.sink_row(item.sequence, source, item.head) * 2
                                           : ring + c.ring_row(item.sequence, source, item.head) * 2;
    ptx::copy_async_16(to + chunk_offset<T>(row, chunk), from + chunk * 16, there ? 16 : 0);
  }
  ptx::commit_copies();
}

template <bool Bf16>
SKVQ_DEVICE void mma_rows(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (Bf16) {
    ptx::mma_bf16(d, a, b0, b1);
  } else {
    ptx::mma_f16(d, a, b0, b1);
  }
}

// Logits of a step in units of log 2; minus infinity for what a column must not see.
template <class T, bool Bf16>
SKVQ_DEVICE void step_logits(const DecodeArgs& a, const std::uint32_t (&q)[T::kBlocks][2], const ColumnView* views,
                             const RowStep& step, const unsigned char* rows, float (&s)[4]) {
  const int lane = lane_index(), matrix = lane / 8, row = lane % 8 + matrix % 2 * 8;
  float product[4] = {};
  unroll<T::kBlocks>([&](auto block) {
    std::uint32_t k[4];
    ptx::load_matrices(k, rows + chunk_offset<T>(row, block * 2 + matrix / 2));
    mma_rows<Bf16>(product, k, q[block][0], q[block][1]);
  });
  unroll<4>([&](auto i) {
    const ColumnView view = views[lane % 4 * 2 + i % 2];
    const int position = step.position + lane / 4 + i / 2 * 8;
    const bool seen = position < step.end && position >= view.begin && position < view.end &&
                      (step.sinks || position >= view.packed_end);
    float logit = product[i] * a.softmax_scale * kLog2e;
    if (transforms_logits(a)) logit = transform_logit(a, logit, view.shift);
    s[i] = seen ? logit : minus_infinity();
  });
}

// Probabilities of a step times its values. In bfloat16 a probability is the sum of two numbers, for its 8 bits alone
// would cost more than the rows' own rounding.
template <class T, bool Bf16>
SKVQ_DEVICE void step_values(const float (&s)[4], const unsigned char* rows, Sums<T>& sums) {
  const int lane = lane_index(), matrix = lane / 8, row = lane % 8 + matrix / 2 * 8;
  float p[4], rest[4];
  unroll<4>([&](auto i) { p[i] = ptx::ex2(s[i] - sums.reference[i % 2]); });
  sums.denominator[0] += p[0] + p[2];
  sums.denominator[1] += p[1] + p[3];
  std::uint32_t low[2], high[2];
  unroll<2>([&](auto i) {
    const std::uint32_t pair = Bf16 ? ptx::pack_bf16(p[2 * i], p[2 * i + 1]) : ptx::pack_f16(p[2 * i], p[2 * i + 1]);
    high[i] = ptx::transpose_8x8(pair);
    if constexpr (Bf16) {
      const ptx::Floats2 rounded = ptx::unpack_bf16(pair);
      rest[2 * i] = p[2 * i] - rounded.low;
      rest[2 * i + 1] = p[2 * i + 1] - rounded.high;
      low[i] = ptx::transpose_8x8(ptx::pack_bf16(rest[2 * i], rest[2 * i + 1]));
    }
  });
  unroll<T::kBlocks>([&](auto block) {
    std::uint32_t v[4];
    ptx::load_matrices_transposed(v, rows + chunk_offset<T>(row, block * 2 + matrix % 2));
    mma_rows<Bf16>(sums.out[block], v, high[0], high[1]);
    if constexpr (Bf16) mma_rows<Bf16>(sums.out[block], v, low[0], low[1]);
  });
}

// Steps steps.begin, steps.begin + stride, ... The rows of V arrive while logits are computed, the next rows of K
// while values are.
template <class T, bool Bf16>
SKVQ_DEVICE void attend_rows(const DecodeArgs& a, const Item& item, ColumnSpan span, const ColumnView* views,
                             TokenRange steps, int stride, unsigned char* memory, Sums<T>& sums) {
  if (steps.begin >= steps.end) return;
  const CacheView& c = a.cache;
  unsigned char *k_rows = memory, *v_rows = memory + kStepTokens * T::kHeadDim * 2;
  RowStep step = row_step(item.work, steps.begin);
  copy_rows<T, Side::kKey>(c, item, step, k_rows);
  copy_rows<T, Side::kValue>(c, item, step, v_rows);
  const QueryReader reader(a, item, span);
  std::uint32_t q[T::kBlocks][2];
  unroll<T::kBlocks>([&](auto block) {
    unroll<2>([&](auto half) { q[block][half] = reader.pair(block * 16 + lane_index() % 4 * 2 + half * 8); });
  });
  for (int index = steps.begin; index < steps.end; index += stride) {
    const bool more = index + stride < steps.end;
    const RowStep next = more ? row_step(item.work, index + stride) : step;
    float s[4], none[1][2] = {};
    ptx::wait_copies<1>();
    __syncwarp();
    step_logits<T, Bf16>(a, q, views, step, k_rows, s);
    __syncwarp();
    if (more) copy_rows<T, Side::kKey>(c, item, next, k_rows);
    if (!more) ptx::commit_copies();
    const float top0 = fmaxf(s[0], s[2]), top1 = fmaxf(s[1], s[3]);
    if (__any_sync(kAllLanes, top0 > sums.reference[0] || top1 > sums.reference[1])) {
      raise_reference(sums, none, top0, top1);
    }
    ptx::wait_copies<1>();
    __syncwarp();
    step_values<T, Bf16>(s, v_rows, sums);
    __syncwarp();
    if (more) copy_rows<T, Side::kValue>(c, item, next, v_rows);
    step = next;
  }
  ptx::wait_copies<0>();
  __syncwarp();  // what follows synchronizes too
}

}  // namespace skvq::cuda

// What a warp knows of the softmax of its eight query rows, spread over its lanes as the tensor cores leave it: lane l
// holds columns 2 (l % 4) and 2 (l % 4) + 1, of the output the channels 16 i + l / 4 and 8 more, of the denominator the
// share of its own tokens. Logits are in units of log 2.
#pragma once

#include "core/softmax.h"
#include "cuda/decode_params.cuh"
#include "cuda/operands.cuh"

namespace skvq::cuda {

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The reference, what logits are reduced by, is set this far above the largest logit and then kept until one exceeds
// it: probabilities stay at most 1, and most tiles need no correction of what was summed before.
inline constexpr float kHeadroom = 4.0f;
// The reference while nothing was seen: so low that any logit exceeds it, and finite, so that minus infinity (a token
// that must not be seen) less it is still minus infinity.
inline constexpr float kNothingSeen = -0x1p126f;

template <class T>
struct Sums {
  float out[T::kBlocks][4];
  float denominator[2];
  float reference[2];

  SKVQ_DEVICE void clear() {
    for (float (&block)[4] : out) {
      for (float& o : block) o = 0.0f;
    }
    for (int column = 0; column < 2; ++column) {
      denominator[column] = 0.0f;
      reference[column] = kNothingSeen;
    }
  }
  // The sums as core/softmax.h knows them; the denominator must be that of all lanes.
  SKVQ_DEVICE SoftmaxState state(int column) const {
    return denominator[column] == 0.0f ? empty_state() : SoftmaxState{reference[column] * kLn2, denominator[column]};
  }
};

SKVQ_DEVICE float larger(float a, float b) {
  return a > b ? a : b;
}
// Over the lanes that hold the same columns: lanes of equal l % 4.
SKVQ_DEVICE float largest_of_column(float x) {
  for (int distance = 4; distance < kWarp; distance *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}
SKVQ_DEVICE float sum_of_column(float x) {
  for (int distance = 4; distance < kWarp; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// Moves the reference of the columns where `top`, a lane's largest logits, exceeds it; `extra` are more sums to
// correct.
template <class T, int N>
SKVQ_DEVICE void raise_reference(Sums<T>& sums, float (&extra)[N][2], float top0, float top1) {
  const float top[2] = {largest_of_column(top0), largest_of_column(top1)};
  float factor[2];
  unroll<2>([&](auto column) {
    const float old = sums.reference[column];
    sums.reference[column] = top[column] > old ? top[column] + kHeadroom : old;
    factor[column] = ptx::ex2(old - sums.reference[column]);
    sums.denominator[column] *= factor[column];
  });
  unroll<T::kBlocks>([&](auto block) { unroll<4>([&](auto i) { sums.out[block][i] *= factor[i % 2]; }); });
  unroll<N>([&](auto i) {
    extra[i][0] *= factor[0];
    extra[i][1] *= factor[1];
  });
}

}  // namespace skvq::cuda

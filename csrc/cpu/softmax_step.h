// One step of the online softmax: R rows and the logits of 64 tokens.
#pragma once

#include "cpu/tile_meta.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// Factors of what was summed before and of what this tile adds.
template <int R>
struct Step {
  float keep[R], weight[R];
};

// Scale and shift, softcap and mask where there are any. Returns the largest logits, lane by lane.
inline Floats finish_logits(const DecodeArgs& a, float shift, TokenRange seen, float* s) {
  Floats top = splat(minus_infinity());
  const auto finish = [&](auto&& change) {
    for (int t = 0; t < kTileTokens; t += kVector) {
      const Floats logit = change(t, load(s + t) * a.softmax_scale + shift);
      top = logit > top ? logit : top;
      store(s + t, logit);
    }
  };
  if (a.softcap == 0.0f && seen.begin <= 0 && seen.end >= kTileTokens) {
    finish([](int, Floats logit) { return logit; });
  } else {
    finish([&](int t, Floats logit) {
      if (a.softcap > 0.0f) {
        for (int lane = 0; lane < kVector; ++lane) logit[lane] = a.softcap * ::tanhf(logit[lane] / a.softcap);
      }
      const Ints token = lane_index() + t;
      return (token >= seen.begin) & (token < seen.end) ? logit : splat(minus_infinity());
    });
  }
  return top;
}

// Logits become probabilities relative to the largest one of the tile, so that 1 is always among them: whoever rounds
// them needs no other measure. Rows go side by side, because each step of a row waits for the one before.
template <int R>
Step<R> softmax_step(const DecodeArgs& a, RowBlock& block, int row, const TokenRange* range, float s[][kTileTokens]) {
  Floats tops[R], sums[R] = {};
  float top[R], total[R];
  for (int r = 0; r < R; ++r) tops[r] = finish_logits(a, block.shift[row + r], range[r], s[r]);
  for (int r = 0; r < R; ++r) top[r] = largest(tops[r]);
  for (int r = 0; r < R; ++r) {
    const float base = top[r] == minus_infinity() ? 0.0f : top[r];
    for (int t = 0; t < kTileTokens; t += kVector) {
      const Floats p = exp_nonpositive(load(s[r] + t) - base);
      store(s[r] + t, p);
      sums[r] += p;
    }
  }
  sum_rows(sums, total);
  Step<R> step;
  for (int r = 0; r < R; ++r) {
    const MergeWeights w = merge(block.state[row + r], {top[r], total[r]});
    block.state[row + r] = w.merged;
    step.keep[r] = w.a;
    step.weight[r] = w.b;
  }
  return step;
}

// Zeros of one group of V, summed lane by lane in multiples of `unit`, to what was summed before.
template <int R>
SKVQ_FN void add_zeros(RowBlock& block, int row, int g, const Floats (&zeros)[R], const Step<R>& step, float unit) {
  float sums[R];
  sum_rows(zeros, sums);
  for (int r = 0; r < R; ++r) {
    float& total = block.zeros[(row + r) * kMaxGroups + g];
    total = total * step.keep[r] + sums[r] * (unit * step.weight[r]);
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

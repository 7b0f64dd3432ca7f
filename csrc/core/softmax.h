// The mergeable state of a softmax over logits that arrive in parts.
//
// Maximum m, sum l of exp(s - m), and o = sum of exp(s - m) * v. Parts merge in any grouping (Milakov and
// Gimelshein 2018; FlashAttention-2 section 3.1).
#pragma once

#include <math.h>

#include "core/minifloat.h"

namespace skvq {

SKVQ_FN float minus_infinity() {
  return bits_float(0xff800000u);
}

struct SoftmaxState {
  float max;  // minus infinity while nothing was seen
  float sum;
};

SKVQ_FN SoftmaxState empty_state() {
  return {minus_infinity(), 0.0f};
}

// Factor for what was summed under `old_max` once the maximum is `new_max`; 0, not NaN, for an empty state.
SKVQ_FN float rescale(float old_max, float new_max) {
  if (old_max == new_max) return old_max == minus_infinity() ? 0.0f : 1.0f;
  return old_max == minus_infinity() ? 0.0f : ::expf(old_max - new_max);
}

struct MergeWeights {
  float a, b;
  SoftmaxState merged;
};

SKVQ_FN MergeWeights merge(SoftmaxState a, SoftmaxState b) {
  const float max = a.max > b.max ? a.max : b.max;
  const float wa = rescale(a.max, max), wb = rescale(b.max, max);
  return {wa, wb, {max, a.sum * wa + b.sum * wb}};
}

SKVQ_FN float log_sum_exp(SoftmaxState s) {
  return s.sum == 0.0f ? minus_infinity() : s.max + ::logf(s.sum);
}
// Rows that saw nothing give 0.
SKVQ_FN float normalizer(SoftmaxState s) {
  return s.sum == 0.0f ? 0.0f : 1.0f / s.sum;
}

}  // namespace skvq

// Loops whose index is a constant.
#pragma once

#include <utility>

#include "cuda/platform.cuh"
#include "skvq/config.h"

namespace skvq::cuda {

// An index that is a constant expression, on the device too.
template <int N>
struct Constant {
  SKVQ_FN constexpr operator int() const { return N; }
};
// Calls f(Constant<0>) to f(Constant<N - 1>).
template <int N, class F>
SKVQ_DEVICE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) { (f(Constant<I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

}  // namespace skvq::cuda

// Torch's own thread pool, as the CPU kernels take it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace skvq::ops {

inline const cpu::Parallel& torch_threads() {
  static constexpr cpu::Parallel parallel{[](std::int64_t count, void* closure, cpu::Parallel::Body body) {
    torch::stable::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) body(closure, i);
    });
  }};
  return parallel;
}

}  // namespace skvq::ops

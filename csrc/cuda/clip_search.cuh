// The choice of a clip ratio for one group of one token, where a plan leaves several open.
#pragma once

#include "core/quantize.h"
#include "cuda/octet.cuh"

namespace skvq::cuda {

// What a search has found. It lies in shared memory; the lanes that hold the group's values add up `error`.
struct GroupSearch {
  Range range;
  float parts;  // error_parts of the range
  float scale;  // of the quantizer that is tried
  float clip;   // the best so far
  std::uint32_t error, least;

  SKVQ_DEVICE void start(const Range& r) {
    range = r;
    parts = error_parts(r.low, r.high);
    least = 0xffffffffu;
  }
  // The first ratio always settles: errors of a whole group stay below the largest number.
  SKVQ_DEVICE void settle(float tried) {
    if (error >= least) return;
    least = error;
    clip = tried;
  }
};

// Args: quantizer, {zero, 1 / scale} as it lies in shared memory.
template <DType D>
SKVQ_DEVICE void add_octet_error(const Octet<D>& x, Extremes quantizer, int levels, GroupSearch& search) {
  const GroupQuantizer q{bits_float(quantizer.least), search.scale, bits_float(quantizer.most), 0, 0};
  std::uint32_t sum = 0;
  unroll<kOctet / 2>([&](auto i) {
    const ptx::Floats2 two = floats_at(x, i);
    sum += squared_error(two.low, q, levels, search.parts) + squared_error(two.high, q, levels, search.parts);
  });
  atomicAdd(&search.error, sum);
}

}  // namespace skvq::cuda

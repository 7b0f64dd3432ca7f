#pragma once

#include "cuda/cuda.h"
#include "cuda/decode_params.cuh"

namespace skvq::cuda {

// Second half of decode attention: merges the slots that the attend kernel left, in a fixed order.
void combine(const DecodeParams& params, Stream stream);

}  // namespace skvq::cuda

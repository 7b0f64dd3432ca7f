// The tables of the maps at the door, for both backends.
#pragma once

#include "skvq/cache.h"

namespace skvq {

// Those of one KV head.
struct HeadTables {
  const std::int32_t* permutation;
  const float *shift, *scale, *matrix;
};

SKVQ_FN HeadTables tables_of(const MapHeadsArgs& a, int kv_head) {
  const std::int64_t at = static_cast<std::int64_t>(kv_head) * a.head_dim;
  return {a.permutation ? a.permutation + at : nullptr, a.shift ? a.shift + at : nullptr,
          a.scale ? a.scale + at : nullptr, a.matrix ? a.matrix + (a.matrix_per_head ? at * a.head_dim : 0) : nullptr};
}

}  // namespace skvq

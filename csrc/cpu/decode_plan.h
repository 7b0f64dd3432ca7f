// How decode attention is cut into work items; plain data between the driver and the kernels.
#pragma once

#include "core/softmax.h"
#include "skvq/cache.h"

namespace skvq::cpu {

inline constexpr int kRowsPerItem = 64;
inline constexpr int kTilesPerItem = 32;

// Rows [first_row, first_row + rows) of one sequence and KV head against tiles [tile_begin, tile_end) and, in the
// first item of a row block, sinks and window.
struct WorkItem {
  int sequence, head, first_row, rows;
  bool full_precision;
  int tile_begin, tile_end;
  float* partial;       // [rows][head_dim]
  SoftmaxState* state;  // [rows]
};

// Buffers of one item in flight.
struct Scratch {
  float* q;              // [kRowsPerItem * head_dim]
  std::int8_t* q8;       // [2 * kRowsPerItem * head_dim]
  void* tile;            // scales and zeros
  std::uint8_t* record;  // a record in arrangement `lanes`
  std::uint8_t* codes;   // [2 * 16 * head_dim]: ternary codes of both sides in two bits
};

}  // namespace skvq::cpu

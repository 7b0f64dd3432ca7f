// How decode attention is cut into work items; plain data between the driver and the kernels.
#pragma once

#include "core/softmax.h"
#include "skvq/cache.h"

namespace skvq::cpu {

inline constexpr int kRowsPerItem = 64;
// A sequence is cut into about this many items, so that it feeds all threads of a large machine, but none is so short
// that what every item costs would show. Both depend on shapes only.
inline constexpr int kItemsPerSequence = 128;
inline constexpr int kFewestTiles = 8;

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

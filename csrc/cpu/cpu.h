// The CPU backend: one function per operation. Arguments are checked by the caller (csrc/torch/checks.h).
#pragma once

#include "cpu/parallel.h"
#include "skvq/cache.h"

namespace skvq::cpu {

// Packs complete tiles, stores the new rows, advances kv_len.
void append(const AppendArgs& args, const Parallel& parallel);

void decode_attention(const DecodeArgs& args, const Parallel& parallel);

void map_heads(const MapHeadsArgs& args, const Parallel& parallel);

void quantize_rows(const QuantizeRowsArgs& args, const Parallel& parallel);
void dequantize_rows(const QuantizeRowsArgs& args, const Parallel& parallel);

// Two partial attention results of the same queries into one.
struct MergeArgs {
  const void *out_a, *out_b;   // [rows, head_dim] of dtype
  const float *lse_a, *lse_b;  // [rows]
  void* out;
  float* lse;
  std::int64_t rows;
  int head_dim;
  DType dtype;
};
void merge_states(const MergeArgs& args, const Parallel& parallel);

// Both sides of the records of chosen pages as fp32 [num_pages, num_kv_heads, 64, head_dim].
struct UnpackPagesArgs {
  const std::uint8_t* pages;      // [*, num_kv_heads, record_bytes]
  const std::int32_t* page_ids;   // [num_pages]
  const std::int32_t* exponents;  // [num_kv_heads, 4]
  RecordFormat format;
  int num_pages, num_kv_heads;
  float *k, *v;
};
void unpack_pages(const UnpackPagesArgs& args, const Parallel& parallel);

}  // namespace skvq::cpu

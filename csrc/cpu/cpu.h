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

void merge_states(const MergeArgs& args, const Parallel& parallel);

void unpack_pages(const UnpackPagesArgs& args, const Parallel& parallel);

}  // namespace skvq::cpu

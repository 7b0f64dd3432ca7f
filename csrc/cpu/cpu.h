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

void permute_channels(const PermuteArgs& args, const Parallel& parallel);

void copy_pages(const CopyPagesArgs& args, const Parallel& parallel);
void unpack_pages(const UnpackPagesArgs& args, const Parallel& parallel);

// Records in another arrangement; codes, scales and zeros stay what they are.
struct RepackArgs {
  const std::uint8_t* from;  // [num_records, record_bytes], arranged as `format` says
  std::uint8_t* to;          // like `from`, in arrangement `target`
  std::int64_t num_records;
  RecordFormat format;
  ArrangementKind target;
};
void repack_records(const RepackArgs& args, const Parallel& parallel);

}  // namespace skvq::cpu

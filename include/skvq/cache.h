// What the kernels are given: one view of the cache and one argument struct per launch.
#pragma once

#include <cstdint>

#include "skvq/record.h"

namespace skvq {

enum class DType : std::uint8_t { kF32, kF16, kBf16 };
SKVQ_FN constexpr int dtype_bytes(DType t) {
  return t == DType::kF32 ? 4 : 2;
}

// Static powers of two by which the stored scales and zeros of one head are multiplied.
struct Exponents {
  int scale, zero;
};

// Order of a sequence's tokens: [sinks | packed pages | window]. Sinks and ring hold rows of `dtype`.
struct CacheView {
  std::uint8_t* pages;             // [num_pages, num_kv_heads, record_bytes]
  const std::int32_t* page_table;  // [batch, max_pages], -1 where no page is
  void* sink_k;                    // [batch, num_sinks, num_kv_heads, head_dim]
  void* sink_v;
  void* ring_k;  // [batch, ring_slots, num_kv_heads, head_dim]; position p lies in slot p % ring_slots
  void* ring_v;
  std::int32_t* kv_len;           // [batch]
  const std::int32_t* exponents;  // [num_kv_heads, 4]: k scale, k zero, v scale, v zero
  std::int64_t num_pages;
  int batch, num_kv_heads, head_dim, max_pages, num_sinks, ring_slots, window;
  DType dtype;
  RecordFormat format;

  // The only address computations of the cache.
  SKVQ_FN std::uint8_t* record(int sequence, int tile, int head) const {
    const std::int64_t page = page_table[static_cast<std::int64_t>(sequence) * max_pages + tile];
    return pages + (page * num_kv_heads + head) * format.record_bytes();
  }
  SKVQ_FN std::int64_t row(int sequence, int slot, int slots, int head) const {
    return ((static_cast<std::int64_t>(sequence) * slots + slot) * num_kv_heads + head) * head_dim;
  }
  SKVQ_FN std::int64_t sink_row(int sequence, int position, int head) const {
    return row(sequence, position, num_sinks, head);
  }
  SKVQ_FN std::int64_t ring_row(int sequence, int position, int head) const {
    return row(sequence, position % ring_slots, ring_slots, head);
  }
  SKVQ_FN Exponents exponents_of(Side side, int head) const {
    const std::int32_t* e = exponents + head * 4 + (side == Side::kKey ? 0 : 2);
    return {e[0], e[1]};
  }
};

// A tensor of rows: element (token, head, channel) at token * token_stride + head * head_stride + channel.
struct RowsView {
  const void* data;
  std::int64_t token_stride, head_stride;
};

// Tokens of sequence b are rows [cu_seqlens[b], cu_seqlens[b + 1]); without cu_seqlens all have equal lengths.
struct Ragged {
  const std::int32_t* cu_seqlens;  // [batch + 1] or null
  std::int64_t num_tokens;
  int batch;

  SKVQ_FN std::int64_t begin(int sequence) const {
    return cu_seqlens ? cu_seqlens[sequence] : num_tokens / batch * sequence;
  }
  SKVQ_FN int length(int sequence) const { return static_cast<int>(begin(sequence + 1) - begin(sequence)); }
};

// Clip ratios: the share of a group's range that is kept. Where a group has several, each of its tokens takes the one
// that errs least.
struct ClipTable {
  const float* ratios;  // [num_kv_heads, groups, choices]
  int choices = 1;

  SKVQ_FN const float* of(int head, int groups, int group) const {
    return ratios + (static_cast<std::int64_t>(head) * groups + group) * choices;
  }
};

struct AppendArgs {
  CacheView cache;
  RowsView k, v;  // [num_tokens, num_kv_heads, head_dim] of cache.dtype
  Ragged tokens;
  ClipTable k_clip, v_clip;

  SKVQ_FN const ClipTable& clip_of(Side side) const { return side == Side::kKey ? k_clip : v_clip; }
};

struct DecodeArgs {
  CacheView cache;
  RowsView q;  // [num_q_tokens, num_q_heads, head_dim] of q_dtype
  Ragged queries;
  DType q_dtype;
  int num_q_heads;
  float softmax_scale;
  float softcap;               // 0: none
  int sliding_window;          // tokens a query sees, itself included; 0: all
  bool exact;                  // packed tiles in fp32 too, not by integer dot products
  bool queries_in_cache;       // the queries are the last cached tokens; else they come right after them
  const float* learned_sinks;  // [num_q_heads] or null: a logit that takes probability and gives nothing
  const float* logit_shift;    // [num_q_tokens, num_q_heads] or null, added to every logit of the row
  void* out;                   // [num_q_tokens, num_q_heads, head_dim] of q_dtype, contiguous
  float* lse;                  // [num_q_tokens, num_q_heads], natural logarithm
};

// The maps between a model's heads and the space of the cache, with tables per KV head.
//   enter: y = ((x - shift) permuted * scale) matrix        k, v and q on their way in
//   leave: x = inverse permutation of (o matrix * scale) + share * shift      o on its way out
struct MapHeadsArgs {
  RowsView x;  // [num_tokens, num_heads, head_dim] of dtype
  DType dtype;
  std::int64_t num_tokens;
  int num_heads, head_dim;
  int ratio;                        // heads that share a KV head
  const std::int32_t* permutation;  // [num_heads / ratio, head_dim] or null
  const float* shift;               // [num_heads / ratio, head_dim] or null
  const float* scale;               // [num_heads / ratio, head_dim] or null
  const float* matrix;              // [head_dim, head_dim], one per KV head or one for all, or null
  bool matrix_per_head;
  bool leave;
  const float* share;  // [num_tokens, num_heads] or null for 1
  void* out;           // [num_tokens, num_heads, head_dim] of dtype, contiguous
};

// Rows of a plain matrix with groups of any size: for research and for tests.
struct QuantizeRowsArgs {
  const void* x;  // [num_rows, num_channels] of dtype, contiguous
  DType dtype;
  std::int64_t num_rows;
  int num_channels, num_groups, row_bytes;
  const std::int32_t* group_start;  // [num_groups + 1] channels
  ClipTable clip;                   // of one head; ratios null: 1
  Code code;
  Meta meta_type;
  Exponents exponents;
  std::uint8_t* codes;  // [num_rows, row_bytes], every group starts at a byte
  void* meta;           // [num_rows, num_groups, 2] of meta_type
  float* decoded;       // [num_rows, num_channels], written by dequantize
};

// out[row, head, channel] = x[row, head, permutation[head, channel]], elements of 2 or 4 bytes.
struct PermuteArgs {
  const void* x;                    // [num_rows, num_heads, head_dim], contiguous
  const std::int32_t* permutation;  // [num_heads, head_dim]
  void* out;                        // like x
  std::int64_t num_rows;
  int num_heads, head_dim, element_bytes;
};

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

// Whole pages from and to places of one pool; no target is a source or occurs twice.
struct CopyPagesArgs {
  std::uint8_t* pages;                          // [*, page_bytes]
  const std::int32_t *source_ids, *target_ids;  // [count]
  std::int64_t count, page_bytes;
};

// Both sides of the records of chosen pages as fp32 [num_pages, num_kv_heads, 64, head_dim].
struct UnpackPagesArgs {
  const std::uint8_t* pages;      // [*, num_kv_heads, record_bytes]
  const std::int32_t* page_ids;   // [num_pages]
  const std::int32_t* exponents;  // [num_kv_heads, 4]
  RecordFormat format;
  int num_pages, num_kv_heads;
  float *k, *v;
};

}  // namespace skvq

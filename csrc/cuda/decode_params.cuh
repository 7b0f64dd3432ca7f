// What the decode kernels are given, and the types a kernel instance is made of.
#pragma once

#include "core/softmax.h"
#include "cuda/platform.cuh"
#include "skvq/arrangement.h"
#include "skvq/cache.h"

namespace skvq::cuda {

inline constexpr int kColumns = 8;       // query rows that one warp serves: the columns of an mma
inline constexpr int kStepTokens = 16;   // tokens of sinks and window that go together
inline constexpr int kStepCost = 2;      // what such a step costs beside a packed tile, in bytes moved
inline constexpr int kMinBlockCost = 8;  // tiles below which splitting costs more than it gains

struct DecodeParams {
  DecodeArgs args;
  float* partial;        // [slots, slot_columns, head_dim], sums not yet divided
  SoftmaxState* states;  // [slots, slot_columns]
  int blocks;            // of the attend kernel
  int group_columns;     // query rows of one work item: kColumns for each warp of a block
  int slot_columns;      // columns a slot has room for
  int stage_bytes;       // of a warp's ring
  int k_meta_offset, v_codes_offset, v_meta_offset, record_bytes;
};

// ---- Formats as types ----

template <Code C>
struct Uniform {
  SKVQ_FN static constexpr TensorFormat format(int head_dim, int group) {
    return {head_dim, group, 1, {{C, 0, head_dim}, {}}};
  }
};
// The first Num / Den of the channels with one code, the rest with another.
template <Code First, int Num, int Den, Code Rest>
struct Bands {
  SKVQ_FN static constexpr TensorFormat format(int head_dim, int group) {
    const int first = head_dim * Num / Den;
    return {head_dim, group, 2, {{First, 0, first}, {Rest, first, head_dim - first}}};
  }
};

// One instance of the decode kernel. Types of metadata and of rows are chosen at run time.
template <int HeadDim, int GroupSize, class K, class V>
struct Instance {
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kBlocks = HeadDim / 16;  // blocks of 16 channels
  static constexpr TensorFormat kKey = K::format(HeadDim, GroupSize), kValue = V::format(HeadDim, GroupSize);
  static constexpr int kKeyGroups = kKey.num_groups(), kValueGroups = kValue.num_groups();
  static constexpr RecordFormat kFormat{kKey, kValue, Meta::kE4m3, ArrangementKind::kMma};
  static constexpr int kMaxRecordBytes = RecordFormat{kKey, kValue, Meta::kFp16, ArrangementKind::kMma}.record_bytes();

  // Rings deep enough to hide the latency of memory, in blocks small enough for 99 KiB.
  static constexpr int kStages = kFormat.record_bytes() <= 4608 ? 3 : 2;
  static constexpr int kWarps = kFormat.record_bytes() * kStages * 4 <= 96 * 1024 ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarp;
  // Resident blocks that the registers must allow: 12 warps with 168 each, or 8 with 255 where there is more to hold.
  static constexpr bool kWide = HeadDim > 128 || kKeyGroups + kValueGroups > 6;
  static constexpr int kBlocksPerMultiprocessor = (kWide ? 8 : 12) / kWarps;
};

SKVQ_FN constexpr int stage_bytes(int record_bytes, int head_dim) {
  const int rows = kStepTokens * head_dim * 2;  // a step's rows of K, or of V
  const int bytes = record_bytes > rows ? record_bytes : rows;
  return (bytes + 127) / 128 * 128;
}

}  // namespace skvq::cuda

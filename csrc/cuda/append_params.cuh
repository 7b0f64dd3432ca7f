// What the append kernels are given: the arguments of the op, and numbers of the format that only the host can look up.
#pragma once

#include "core/window.h"
#include "cuda/platform.cuh"

namespace skvq::cuda {

struct PackedBand {
  int begin, channels, levels;
  int low_bits, high_bits;  // widths of the planes; 0 and 0 for base 3
  int offset;               // in the record
  Side rows;                // of which side its matrices are, Mma::kTritRows for base 3
};
struct PackedSide {
  PackedBand bands[kMaxBands];
  int num_bands, num_groups;
  int meta_offset;  // in the record
};

inline constexpr int kOctet = 8;  // adjacent channels, as one lane loads them

// How far a lane moves from pass to pass: by two passes, and from an even pass to the next.
struct PassSteps {
  int two, one;
  SKVQ_FN constexpr int at(int pass) const { return pass / 2 * two + pass % 2 * one; }
};

// How the octets of the rows of a tile are dealt to the lanes of a warp. A pass takes two adjacent tokens for each
// lane; rows of more than 32 octets take two passes. The values of some passes are held at once: a chunk.
struct OctetDeal {
  int octets;  // of a row
  int pairs;   // of tokens in a pass
  int chunk_tokens;
  int stride;  // octets from token to token in shared memory, twice an odd number: lanes that read two octets each of
               // as many tokens meet in no bank
  PassSteps token_steps, octet_steps, stride_steps;  // the last: places in shared memory
  int more_groups, more_tokens;                      // 32 as groups of chunk_tokens, and what is left

  SKVQ_FN static constexpr OctetDeal of(int head_dim, int passes) {
    const int octets = head_dim / kOctet, pairs = octets < kWarp ? kWarp / octets : 1;
    const bool halves = octets > kWarp;
    const PassSteps tokens = halves ? PassSteps{2, 0} : PassSteps{4 * pairs, 2 * pairs};
    const int chunk_tokens = tokens.at(passes), stride = (octets / 2 | 1) * 2, half = halves ? kWarp : 0;
    return {octets,
            pairs,
            chunk_tokens,
            stride,
            tokens,
            {0, half},
            {tokens.two * stride, tokens.one * stride + half},
            kWarp / chunk_tokens,
            kWarp % chunk_tokens};
  }
};

struct AppendParams {
  AppendArgs args;
  PackedSide sides[2];  // by Side
  OctetDeal deal;
  int record_bytes;
  int pack_warps;     // of a block; each has a scratch of its own
  int scratch_bytes;  // of one of them
  bool vectors;       // rows and what lies between them are multiples of kVectorBytes
};

// A sequence before and after the call. Its tiles [first_tile, end_tile) are complete now.
struct Growth {
  int old_len, new_len;
  int first_tile, end_tile;
  std::int64_t input;  // position p is row input + p of k and v, from old_len on
};

SKVQ_DEVICE Growth growth_of(const AppendArgs& a, int sequence) {
  const CacheView& c = a.cache;
  const int old_len = c.kv_len[sequence], new_len = old_len + a.tokens.length(sequence);
  return {old_len, new_len, packed_tiles(old_len, c.num_sinks, c.window), packed_tiles(new_len, c.num_sinks, c.window),
          a.tokens.begin(sequence) - old_len};
}

// Row `token` of k or v.
SKVQ_DEVICE const unsigned char* input_row(const AppendArgs& a, Side side, std::int64_t token, int head) {
  const RowsView& rows = side == Side::kKey ? a.k : a.v;
  const std::int64_t at = token * rows.token_stride + head * rows.head_stride;
  return static_cast<const unsigned char*>(rows.data) + at * dtype_bytes(a.cache.dtype);
}

SKVQ_DEVICE unsigned char* ring_row(const CacheView& c, Side side, int sequence, int head, int position) {
  void* ring = side == Side::kKey ? c.ring_k : c.ring_v;
  return static_cast<unsigned char*>(ring) + c.ring_row(sequence, position, head) * dtype_bytes(c.dtype);
}
SKVQ_DEVICE unsigned char* sink_row(const CacheView& c, Side side, int sequence, int head, int position) {
  void* sinks = side == Side::kKey ? c.sink_k : c.sink_v;
  return static_cast<unsigned char*>(sinks) + c.sink_row(sequence, position, head) * dtype_bytes(c.dtype);
}

}  // namespace skvq::cuda

// Decode attention: a fixed grid of blocks whose warps stream packed tiles through rings of their own.
//
// A block walks over its segments (schedule.cuh). In a segment its warps take tiles in turn, each with sums of its own;
// they meet once at the end, and the segment's sums go to its slot. csrc/cuda/combine.cu puts the slots together.
#pragma once

#include "cuda/exact_rows.cuh"
#include "cuda/packed_tiles.cuh"
#include "cuda/ring.cuh"

namespace skvq::cuda {

// The part of an item that a block does: steps and tiles, as [begin, end) each.
struct Segment {
  TokenRange steps, tiles;
};
SKVQ_DEVICE Segment segment_of(const Item& item, int begin, int end) {
  const int steps = item.work.steps(), tiles = item.work.line() - steps * kStepCost;
  const auto units = [&](int at) { return (max_int(at, item.begin) - item.begin + item.warps - 1) / item.warps; };
  const auto step = [&](int unit) { return min_int((unit + kStepCost - 1) / kStepCost, steps); };
  const auto tile = [&](int unit) {
    return item.work.tile_begin + min_int(max_int(0, unit - steps * kStepCost), tiles);
  };
  const int first = units(begin), last = units(min_int(end, item.end));
  return {{step(first), step(last)}, {tile(first), tile(last)}};
}

// What a warp keeps in shared memory of its columns.
template <class T>
struct WarpShared {
  ColumnSpan span;
  TokenRange plain;  // tiles that need no restriction
  ColumnView views[kColumns];
  SoftmaxState states[kColumns];
  QueryNumbers<T> queries;
};

template <class T>
struct DecodeShared {
  std::uint64_t arrived[T::kWarps][T::kStages];  // barriers of the rings
  TokenRange share;                              // the block's, of the line of all items
  Item item;                                     // that the block is at, and its part of it
  Segment segment;
  WarpShared<T> warps[T::kWarps];
};

// Where the records of a warp's tiles lie; lanes look up 32 pages at once.
struct RecordQueue {
  int end, stride;           // of the warp's tiles
  int looked_up = kWarp;     // of the 32, those that were handed out
  std::uint32_t offset = 0;  // of this lane's record in the pool, in units of 16 bytes

  // The record of `tile`, where the call before asked for the one `stride` before it. Where a page is not there the
  // result of the whole segment must not look like one: `units` become NaN, and with them all probabilities from then
  // on.
  SKVQ_DEVICE const unsigned char* at(int tile, const CacheView& c, const Item& item, int record_bytes,
                                      float (&units)[kColumns]) {
    if (looked_up == kWarp) {
      looked_up = 0;
      const int mine = tile + lane_index() * stride;
      const std::int64_t row = static_cast<std::int64_t>(item.sequence) * c.max_pages;
      const std::int32_t page = mine < end ? c.page_table[row + mine] : 0;
      const bool bad = page < 0 || page >= c.num_pages;
      const std::uint32_t record = static_cast<std::uint32_t>(bad ? 0 : page) * c.num_kv_heads + item.head;
      offset = record * (record_bytes / 16);
      if (__any_sync(kAllLanes, bad) && lane_index() < kColumns) units[lane_index()] = quiet_nan();
      __syncwarp();
    }
    return c.pages + static_cast<std::uint64_t>(__shfl_sync(kAllLanes, offset, looked_up++)) * 16;
  }
};

// By all lanes of the warp.
template <class T>
SKVQ_DEVICE void choose_columns(const DecodeParams& p, const Item& item, int column_warp, WarpShared<T>& mine) {
  const int lane = lane_index();
  const ColumnSpan span = span_of(p, item, column_warp);
  if (lane < kColumns) {
    mine.views[lane] = lane < span.count ? view_of(p.args, item, span.first + lane) : ColumnView{};
  }
  __syncwarp();
  if (lane == 0) {
    mine.span = span;
    mine.plain = transforms_logits(p.args) || span.count == 0
                     ? TokenRange{0, 0}
                     : plain_tiles(p.args.cache, mine.views[0], mine.views[span.count - 1]);
  }
  __syncwarp();
}

// A warp's share of the tiles of a segment: tiles.begin, tiles.begin + stride, ...
template <class T, class R>
SKVQ_DEVICE void attend_tiles(const DecodeParams& p, const Item& item, WarpShared<T>& mine, TokenRange tiles,
                              int stride, R& ring, Sums<T>& sums) {
  const CacheView& c = p.args.cache;
  if (c.num_pages == 0) {  // as in RecordQueue, but there is nothing that could be read instead
    sums.denominator[0] = sums.denominator[1] = quiet_nan();
    return;
  }
  const bool fp16 = c.format.meta == Meta::kFp16;
  RecordQueue records{tiles.end, stride};
  PackedQueries<T> q;
  load_queries<T>(p.args, item, mine.span, mine.queries, q);
  sums.clear();
  float zeros[T::kValueGroups][2] = {};
  const auto load = [&](auto ahead, int tile) {
    const bool there = tile < tiles.end;
    const unsigned char* from = there ? records.at(tile, c, item, p.record_bytes, mine.queries.units) : nullptr;
    ring.template load<ahead, T::kMaxRecordBytes>(there, from, p.record_bytes);
  };
  ring.written();
  unroll<T::kStages - 1>([&](auto ahead) { load(ahead, tiles.begin + ahead * stride); });
  for (int tile = tiles.begin; tile < tiles.end; tile += stride) {
    unsigned char* record = ring.next();
    load(Constant<T::kStages - 2>{}, tile + (T::kStages - 1) * stride);
    float s[Mma::kSteps][4];
    tile_logits<T>(p, q, mine.queries, record, fp16, s);
    const float2 unit = mine.queries.pair(mine.queries.units);
    if (tile < mine.plain.begin || tile >= mine.plain.end) {
      restrict_tile<T>(p, mine.views, mine.span.count, unit, c.num_sinks + tile * kTileTokens, record, fp16, s);
      ring.written();
    }
    float top[2] = {s[0][0], s[0][1]};
    unroll<Mma::kSteps>([&](auto step) { unroll<4>([&](auto j) { top[j % 2] = fmaxf(top[j % 2], s[step][j]); }); });
    top[0] *= unit.x;
    top[1] *= unit.y;
    if (__any_sync(kAllLanes, top[0] > sums.reference[0] || top[1] > sums.reference[1])) {
      raise_reference(sums, zeros, top[0], top[1]);
    }
    tile_values<T>(p, s, unit, record, fp16, sums, zeros);
  }
  ring.drain();
  apply_value_units(c, item.head, sums, zeros);
}

// The sums of the warps of one segment into its slot. `mine` is this warp's region of shared memory.
template <class T>
SKVQ_DEVICE void store_segment(const DecodeParams& p, const Item& item, DecodeShared<T>& shared, unsigned char* memory,
                               int warp_bytes, Sums<T>& sums) {
  const int lane = lane_index(), warp = warp_index();
  float* mine = reinterpret_cast<float*>(memory + warp * warp_bytes);  // [kColumns][head_dim]
  unroll<2>([&](auto column) {
    sums.denominator[column] = sum_of_column(sums.denominator[column]);
    if (lane < 4) shared.warps[warp].states[lane * 2 + column] = sums.state(column);
  });
  unroll<T::kBlocks>([&](auto block) {
    unroll<4>([&](auto i) {
      mine[(lane % 4 * 2 + i % 2) * T::kHeadDim + block * 16 + lane / 4 + i / 2 * 8] = sums.out[block][i];
    });
  });
  __syncthreads();
  const int columns = min_int(p.group_columns, item.work.columns - item.group * p.group_columns);
  const std::int64_t slot = static_cast<std::int64_t>(item.index + static_cast<int>(blockIdx.x)) * p.slot_columns;
  for (int i = threadIdx.x; i < columns * T::kHeadDim; i += T::kThreads) {
    const int column = i / T::kHeadDim, channel = i % T::kHeadDim, in_warp = column % kColumns;
    SoftmaxState total = empty_state();
    float out = 0.0f;
    for (int w = column / kColumns; w < T::kWarps; w += item.warps) {
      const MergeWeights weights = merge(total, shared.warps[w].states[in_warp]);
      const float* theirs = reinterpret_cast<const float*>(memory + w * warp_bytes);
      out = out * weights.a + theirs[in_warp * T::kHeadDim + channel] * weights.b;
      total = weights.merged;
    }
    p.partial[(slot + column) * T::kHeadDim + channel] = out;
    if (channel == 0) p.states[slot + column] = total;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerMultiprocessor) attend_kernel(const DecodeParams p) {
  SKVQ_DYNAMIC_SHARED(memory);
  SKVQ_SHARED(DecodeShared<T>, shared);
  const int warp = warp_index(), lane = lane_index(), warp_bytes = T::kStages * p.stage_bytes;
  unsigned char* rows = memory + warp * warp_bytes;  // the ring's memory, between its uses
  WarpShared<T>& mine = shared.warps[warp];
  Ring<T::kStages> ring(rows, p.stage_bytes, shared.arrived[warp]);
  if (warp == 0) {
    const int total = total_cost(p), share = cost_per_block(p, total), begin = static_cast<int>(blockIdx.x) * share;
    if (lane == 0) shared.share = {begin, min_int(total, begin + share)};
  }
  __syncthreads();
  for (int at = shared.share.begin; at < shared.share.end;) {
    const Item& item = shared.item;
    if (warp == 0) {
      const Item found = find_item(p, at);
      if (lane == 0) {
        shared.item = found;
        shared.segment = segment_of(found, at, shared.share.end);
      }
    }
    __syncthreads();
    const Segment& segment = shared.segment;
    const int stride = T::kWarps / item.warps, first = warp / item.warps;
    choose_columns(p, item, warp % item.warps, mine);
    Sums<T> sums;
    sums.clear();
    if (mine.span.count > 0) {
      if (segment.tiles.begin + first < segment.tiles.end) {
        attend_tiles<T>(p, item, mine, {segment.tiles.begin + first, segment.tiles.end}, stride, ring, sums);
      }
      const TokenRange steps{segment.steps.begin + first, segment.steps.end};
      if (p.args.cache.dtype == DType::kBf16) {
        attend_rows<T, true>(p.args, item, mine.span, mine.views, steps, stride, rows, sums);
      } else {
        attend_rows<T, false>(p.args, item, mine.span, mine.views, steps, stride, rows, sums);
      }
    }
    at = item.end;
    store_segment<T>(p, item, shared, memory, warp_bytes, sums);
  }
}

}  // namespace skvq::cuda

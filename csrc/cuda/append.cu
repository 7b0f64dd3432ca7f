// Append: pack the tiles that are complete now, store the new rows in sinks and ring, advance kv_len.
//
// How long sequences are, and so which tiles complete, is known on the device only; launches depend on shapes. Every
// step works from the old kv_len, which therefore changes in a launch of its own or behind the last barrier of the only
// block that looks at the sequence. Rows must not reach the ring before the tiles are packed: one may take the place of
// a row that a tile needs.
#include "cuda/checks.h"
#include "cuda/lanes.cuh"
#include "cuda/launch.cuh"
#include "cuda/pack_tile.cuh"

namespace skvq::cuda {
namespace {

constexpr int kPackThreads = 128;  // for large calls, and as many warps as have room for their scratch
constexpr int kStoreThreads = 256;
constexpr int kStoreBatch = 4;               // rows of K and V that a warp has under way at once
constexpr int kMaxScratchBytes = 96 * 1024;  // of a block: what every GPU from sm_80 on has
// Up to so many tokens one launch does it all: it seldom meets a complete tile, which a single block packs slowly.
constexpr std::int64_t kFewTokens = 8;

// ---- Storing rows ----

// Positions [begin, begin + sinks) go to the sinks and [ring_begin, ring_begin + ring) to the ring.
struct NewRows {
  int sinks, ring_begin, ring;
};

SKVQ_DEVICE NewRows new_rows(const CacheView& c, const Growth& g) {
  const int sinks = max_int(0, min_int(g.new_len, c.num_sinks) - g.old_len);
  const int first = max_int(max_int(g.old_len, c.num_sinks), ring_begin(g.new_len, c.num_sinks, c.ring_slots));
  return {sinks, first, max_int(0, g.new_len - first)};
}

struct CopiedRow {
  const unsigned char* from;
  unsigned char* to;
};

SKVQ_DEVICE CopiedRow copied_row(const AppendArgs& a, const Growth& g, const NewRows& rows, Side side, int sequence,
                                 int head, int index) {
  const bool sink = index < rows.sinks;
  const int position = sink ? g.old_len + index : rows.ring_begin + index - rows.sinks;
  return {input_row(a, side, g.input + position, head),
          sink ? sink_row(a.cache, side, sequence, head, position) : ring_row(a.cache, side, sequence, head, position)};
}

// Unit u of a row and of its other side: U of the first `units` are K's.
template <class Unit>
SKVQ_DEVICE void store_rows(const AppendArgs& a, const Growth& g, int sequence, int worker, int workers) {
  const CacheView& c = a.cache;
  const NewRows rows = new_rows(c, g);
  const int count = (rows.sinks + rows.ring) * c.num_kv_heads;
  const int units = c.head_dim * dtype_bytes(c.dtype) / static_cast<int>(sizeof(Unit));
  for (int u = lane_index(); u < 2 * units; u += kWarp) {
    const Side side = u < units ? Side::kKey : Side::kValue;
    const int at = (u < units ? u : u - units) * static_cast<int>(sizeof(Unit));
    for (int first = worker; first < count; first += workers * kStoreBatch) {
      Unit x[kStoreBatch];
      unsigned char* to[kStoreBatch];
#pragma unroll
      for (int i = 0; i < kStoreBatch; ++i) {
        const int row = first + i * workers;
        to[i] = nullptr;
        if (row >= count) continue;
        const CopiedRow copied = copied_row(a, g, rows, side, sequence, row % c.num_kv_heads, row / c.num_kv_heads);
        x[i] = *reinterpret_cast<const Unit*>(copied.from + at);
        to[i] = copied.to + at;
      }
#pragma unroll
      for (int i = 0; i < kStoreBatch; ++i) {
        if (to[i] != nullptr) *reinterpret_cast<Unit*>(to[i]) = x[i];
      }
    }
  }
}

// Shared out to `workers` warps.
SKVQ_DEVICE void store_new_rows(const AppendParams& p, const Growth& g, int sequence, int worker, int workers) {
  if (p.vectors) {
    store_rows<uint4>(p.args, g, sequence, worker, workers);
  } else {
    store_rows<std::uint16_t>(p.args, g, sequence, worker, workers);
  }
}

// ---- Kernels ----

// A block for each sequence does everything.
template <DType D, bool kSearching>
__global__ void __launch_bounds__(kStoreThreads, 1) append_few(const __grid_constant__ AppendParams p) {
  SKVQ_DYNAMIC_SHARED(shared);
  const int sequence = static_cast<int>(blockIdx.x), warp = warp_index();
  const CacheView& c = p.args.cache;
  const Growth g = growth_of(p.args, sequence);
  const int sides = 2 * c.num_kv_heads, tasks = (g.end_tile - g.first_tile) * sides;
  if (warp < p.pack_warps) {
    const PackScratch scratch(shared + warp * p.scratch_bytes, p.deal);
    for (int i = warp; i < tasks; i += p.pack_warps) {
      const TileSlot slot{sequence, g.first_tile + i / sides, g.old_len, g.input};
      pack_tile<D, kSearching>(p, slot, i % sides / 2, i % 2 == 0 ? Side::kKey : Side::kValue, scratch);
    }
  }
  __syncthreads();
  store_new_rows(p, g, sequence, warp, kStoreThreads / kWarp);
  if (threadIdx.x == 0) c.kv_len[sequence] = g.new_len;
}

// Complete tiles are numbered sequence by sequence. Finds number `slot`, by all lanes of a warp; sequence -1: there are
// not so many.
SKVQ_DEVICE TileSlot find_slot(const AppendArgs& a, int slot) {
  const int lane = lane_index();
  for (int base = 0; base < a.cache.batch; base += kWarp) {
    Growth g{};
    if (base + lane < a.cache.batch) g = growth_of(a, base + lane);
    const int tiles = max_int(0, g.end_tile - g.first_tile);
    const int end = inclusive_scan(tiles);  // of this lane's numbers
    const unsigned owner = __ballot_sync(kAllLanes, slot < end && slot >= end - tiles);
    if (owner != 0) {
      const int from = __ffs(static_cast<int>(owner)) - 1;
      return {base + from, __shfl_sync(kAllLanes, g.first_tile + slot - (end - tiles), from),
              __shfl_sync(kAllLanes, g.old_len, from), __shfl_sync(kAllLanes, g.input, from)};
    }
    slot -= __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  return {-1, 0, 0, 0};
}

// A warp for one side of one head of one complete tile; the heads of a tile, neighbours in memory, go to adjacent
// blocks.
template <DType D, bool kSearching>
__global__ void __launch_bounds__(kPackThreads, 3) pack_tiles(const __grid_constant__ AppendParams p) {
  SKVQ_DYNAMIC_SHARED(shared);
  const int sides = 2 * p.args.cache.num_kv_heads, parts = (sides + p.pack_warps - 1) / p.pack_warps;
  const int index = static_cast<int>(blockIdx.x), side = index % parts * p.pack_warps + warp_index();
  if (side >= sides) return;
  const TileSlot slot = find_slot(p.args, index / parts);
  if (slot.sequence < 0) return;
  pack_tile<D, kSearching>(p, slot, side / 2, side % 2 == 0 ? Side::kKey : Side::kValue,
                           PackScratch(shared + warp_index() * p.scratch_bytes, p.deal));
}

// Blocks (sequences, parts). Where one block stores all rows of a sequence it also advances kv_len.
__global__ void __launch_bounds__(kStoreThreads) store_rows_of_call(const __grid_constant__ AppendParams p) {
  constexpr int kWarps = kStoreThreads / kWarp;
  const int sequence = static_cast<int>(blockIdx.x), parts = static_cast<int>(gridDim.y);
  const Growth g = growth_of(p.args, sequence);
  store_new_rows(p, g, sequence, static_cast<int>(blockIdx.y) * kWarps + warp_index(), parts * kWarps);
  if (parts > 1) return;
  __syncthreads();
  if (threadIdx.x == 0) p.args.cache.kv_len[sequence] = g.new_len;
}

__global__ void advance_lengths(const __grid_constant__ AppendArgs a) {
  const int sequence = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (sequence < a.cache.batch) a.cache.kv_len[sequence] += a.tokens.length(sequence);
}

// ---- Launches ----

PackedSide packed_side(const RecordFormat& format, Side side) {
  const TensorFormat& tensor = format.side(side);
  PackedSide packed{{}, tensor.num_bands, tensor.num_groups(), format.meta_offset(side)};
  for (int b = 0; b < tensor.num_bands; ++b) {
    const Band& band = tensor.bands[b];
    const CodeTraits code = traits(band.code);
    packed.bands[b] = {band.begin,
                       band.channels,
                       code.levels,
                       code.plane_bits[0],
                       code.plane_bits[1],
                       format.band_offset(side, b),
                       is_base3(band.code) ? Mma::kTritRows : side};
  }
  return packed;
}

bool rows_are_vectors(const AppendArgs& a) {
  const CacheView& c = a.cache;
  bool vectors = true;
  for (const void* p : {a.k.data, a.v.data, static_cast<const void*>(c.sink_k), static_cast<const void*>(c.sink_v),
                        static_cast<const void*>(c.ring_k), static_cast<const void*>(c.ring_v)}) {
    vectors = vectors && is_vector_aligned(p);
  }
  for (const std::int64_t stride : {a.k.token_stride, a.k.head_stride, a.v.token_stride, a.v.head_stride}) {
    vectors = vectors && stride * dtype_bytes(c.dtype) % kVectorBytes == 0;
  }
  return vectors;
}

template <DType D, bool kSearching>
void launch_few(AppendParams p, Stream stream) {
  p.pack_warps = min_int(kStoreThreads / kWarp, kMaxScratchBytes / p.scratch_bytes);
  launch("append_few", append_few<D, kSearching>, {p.args.cache.batch}, kStoreThreads, p.pack_warps * p.scratch_bytes,
         stream, p);
}

template <DType D, bool kSearching>
void launch_pack(AppendParams p, Stream stream) {
  const CacheView& c = p.args.cache;
  p.pack_warps = min_int(kPackThreads / kWarp, kMaxScratchBytes / p.scratch_bytes);
  const std::int64_t slots = p.args.tokens.num_tokens / kTileTokens + c.batch;
  const std::int64_t parts = (2 * c.num_kv_heads + p.pack_warps - 1) / p.pack_warps;
  launch("pack_tiles", pack_tiles<D, kSearching>, {slots * parts}, p.pack_warps * kWarp, p.pack_warps * p.scratch_bytes,
         stream, p);
}

void launch_store(const AppendParams& p, Stream stream) {
  const CacheView& c = p.args.cache;
  // As many rows as an average sequence can have to store.
  const std::int64_t average = (p.args.tokens.num_tokens + c.batch - 1) / c.batch;
  const std::int64_t most = static_cast<std::int64_t>(c.num_sinks) + c.ring_slots;
  const std::int64_t rows = (average < most ? average : most) * c.num_kv_heads;
  constexpr std::int64_t kRowsPerBlock = kStoreThreads / kWarp * kStoreBatch, kMaxParts = 1024;
  const std::int64_t wanted = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  const std::int64_t parts = wanted < kMaxParts ? wanted : kMaxParts;
  launch("store_rows_of_call", store_rows_of_call, {c.batch, parts}, kStoreThreads, 0, stream, p);
  if (parts == 1) return;
  launch("advance_lengths", advance_lengths, {(c.batch + kStoreThreads - 1) / kStoreThreads}, kStoreThreads, 0, stream,
         p.args);
}

template <DType D, bool kSearching>
void append_rows(AppendParams p, Stream stream) {
  p.deal = OctetDeal::of(p.args.cache.head_dim, kPasses<D>);
  p.scratch_bytes = PackScratch::bytes(p.deal, kSearching);
  if (p.args.tokens.num_tokens <= kFewTokens) return launch_few<D, kSearching>(p, stream);
  launch_pack<D, kSearching>(p, stream);
  launch_store(p, stream);
}

}  // namespace

void append(const AppendArgs& args, Stream stream) {
  const CacheView& c = args.cache;
  check_arrangement(c.format);
  check_aligned(c.pages, "pages");
  if (c.batch == 0 || args.tokens.num_tokens == 0) return;
  AppendParams p{};
  p.args = args;
  for (const Side side : kSides) p.sides[static_cast<int>(side)] = packed_side(c.format, side);
  p.record_bytes = c.format.record_bytes();
  p.vectors = rows_are_vectors(args);
  const bool searching = args.k_clip.choices > 1 || args.v_clip.choices > 1;
  switch (c.dtype) {
    case DType::kF32:
      return (searching ? append_rows<DType::kF32, true> : append_rows<DType::kF32, false>)(p, stream);
    case DType::kF16:
      return (searching ? append_rows<DType::kF16, true> : append_rows<DType::kF16, false>)(p, stream);
    case DType::kBf16:
      return (searching ? append_rows<DType::kBf16, true> : append_rows<DType::kBf16, false>)(p, stream);
  }
}

}  // namespace skvq::cuda

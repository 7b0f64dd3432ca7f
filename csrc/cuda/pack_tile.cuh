// One warp quantizes one side of one tile of one head and packs it into its record.
//
// Rows are loaded once, 16 bytes a lane, some tokens at a time: lanes find the range of their eight channels, the warp
// shares out the groups to make quantizers, and the lanes write codes from the values they still hold. The codes of the
// whole tile then lie in shared memory, from where they are taken in the order of the record.
#pragma once

#include "core/quantize.h"
#include "cuda/clip_search.cuh"
#include "cuda/code_stage.cuh"
#include "cuda/octet.cuh"

namespace skvq::cuda {

struct GroupTask {
  std::int16_t first, end;  // octets
  int levels;
  float clip;
};
// What the lanes need to know that quantize an octet, row after row.
struct alignas(16) OctetTask {
  std::int16_t group;  // its first octet
  Side rows;           // PackedBand::rows
  int levels;
  int staged;      // where the codes of token 0 go
  int step_bytes;  // from there to token 16
};

// Shared memory of one warp.
struct PackScratch {
  const unsigned char** rows;  // [kTileTokens], the channels of the head
  GroupTask* groups;           // [kMaxGroups]
  OctetTask* octets;           // [octets of a row]
  Extremes* extremes;          // [tokens of a chunk][stride]; at a group's first octet later {zero, 1 / scale}
  unsigned char* codes;        // [matrix_bytes_of(head_dim)]
  GroupSearch* searches;       // [tokens of a chunk][octets / 2], by a group's first octet; where ratios are chosen

  static constexpr int kRowsBytes = kTileTokens * sizeof(unsigned char*);
  static constexpr int kGroupsBytes = (kMaxGroups * sizeof(GroupTask) + 15) / 16 * 16;

  SKVQ_FN static constexpr int octets_bytes(const OctetDeal& deal) {
    return deal.octets * static_cast<int>(sizeof(OctetTask));
  }
  SKVQ_FN static constexpr int extremes_bytes(const OctetDeal& deal) {
    return deal.chunk_tokens * deal.stride * static_cast<int>(sizeof(Extremes));
  }
  SKVQ_FN static constexpr int bytes_without_search(const OctetDeal& deal) {
    return kRowsBytes + kGroupsBytes + octets_bytes(deal) + extremes_bytes(deal) +
           matrix_bytes_of(deal.octets * kOctet);
  }
  SKVQ_FN static constexpr int bytes(const OctetDeal& deal, bool searching) {
    const int searches = searching ? deal.chunk_tokens * deal.octets / 2 : 0;
    return bytes_without_search(deal) + searches * static_cast<int>(sizeof(GroupSearch));
  }

  SKVQ_DEVICE PackScratch(unsigned char* memory, const OctetDeal& deal)
      : rows(reinterpret_cast<const unsigned char**>(memory)),
        groups(reinterpret_cast<GroupTask*>(memory + kRowsBytes)),
        octets(reinterpret_cast<OctetTask*>(memory + kRowsBytes + kGroupsBytes)),
        extremes(reinterpret_cast<Extremes*>(memory + kRowsBytes + kGroupsBytes + octets_bytes(deal))),
        codes(memory + bytes_without_search(deal) - matrix_bytes_of(deal.octets * kOctet)),
        searches(reinterpret_cast<GroupSearch*>(memory + bytes_without_search(deal))) {}

  SKVQ_DEVICE GroupSearch& search(const OctetDeal& deal, int token, int first_octet) const {
    return searches[(token * deal.octets + first_octet) / 2];
  }
};

struct TileSlot {
  int sequence, tile;
  int old_len;         // of the sequence
  std::int64_t input;  // Growth::input of the sequence
};
struct PackTask : TileSlot {
  int head;
  Side side;
  unsigned char* record;
};

// ---- Rows, groups and octets of the task ----

SKVQ_DEVICE OctetTask octet_task(const PackedSide& packed, const GroupTask* groups, int octet) {
  int g = 0;
  while (octet >= groups[g].end) ++g;
  const int channel = octet * kOctet;
  const PackedBand& band = packed.bands[packed.num_bands == 2 && channel >= packed.bands[1].begin ? 1 : 0];
  const int matrix = matrix_bytes_of(band.begin) + (channel - band.begin) / 16 * kMatrixBytes;
  return {groups[g].first, band.rows, groups[g].levels, matrix + staged_at(band.rows, 0, channel % 16),
          matrix_bytes_of(band.channels) / Mma::kSteps};
}

SKVQ_DEVICE void prepare(const AppendParams& p, const PackTask& t, const PackScratch& s) {
  const AppendArgs& a = p.args;
  const CacheView& c = a.cache;
  const int lane = lane_index();
  const PackedSide& side = p.sides[static_cast<int>(t.side)];
  if (lane < side.num_groups) {
    const Group g = c.format.side(t.side).group_at(lane);
    s.groups[lane] = {static_cast<std::int16_t>(g.begin / kOctet), static_cast<std::int16_t>(g.end / kOctet),
                      side.bands[g.band].levels, *a.clip_of(t.side).of(t.head, side.num_groups, lane)};
  }
  for (int i = lane; i < kTileTokens; i += kWarp) {
    const int position = c.num_sinks + t.tile * kTileTokens + i;
    s.rows[i] = position < t.old_len ? ring_row(c, t.side, t.sequence, t.head, position)
                                     : input_row(a, t.side, t.input + position, t.head);
  }
  __syncwarp();
  for (int octet = lane; octet < p.deal.octets; octet += kWarp) {
    s.octets[octet] = octet_task(side, s.groups, octet);
  }
}

// ---- Quantizers ----

SKVQ_DEVICE void store_group_meta(Meta meta, unsigned char* section, int groups, int token, int group,
                                  const GroupQuantizer& q) {
  static_assert(Mma::meta(1, 9, 0, 1) == Mma::meta(1, 9, 0, 0) + 1 && Mma::meta(1, 9, 0, 0) % 2 == 0);
  const int pair = Mma::meta(groups, token, group, 0) / 2;
  if (meta == Meta::kE4m3) {
    reinterpret_cast<std::uint16_t*>(section)[pair] = static_cast<std::uint16_t>(q.scale_bits | q.zero_bits << 8);
  } else {
    reinterpret_cast<std::uint32_t*>(section)[pair] = q.scale_bits | static_cast<std::uint32_t>(q.zero_bits) << 16;
  }
}

template <DType D>
SKVQ_DEVICE Range range_of_group(const GroupTask& group, const Extremes* of_token) {
  Extremes e = of_token[group.first];
  for (int octet = group.first; octet < group.end; octet += 2) {
    const uint4 two = *reinterpret_cast<const uint4*>(of_token + octet);
    e = join<D>(e, join<D>({two.x, two.y}, {two.z, two.w}));
  }
  return range_of<D>(e);
}

// Those of a chunk, dealt to the lanes: this one starts at token `token` of group `group`.
struct QuantizerDeal {
  int group, token;
  Exponents exponents;
};

// Visits the groups and tokens of a lane in the chunk that starts at token `first`.
template <class F>
SKVQ_DEVICE void each_quantizer(const AppendParams& p, int num_groups, QuantizerDeal lane, int first, F&& visit) {
  while (lane.group < num_groups) {
    if (first + lane.token < kTileTokens) visit(lane.group, lane.token);
    lane.group += p.deal.more_groups;
    lane.token += p.deal.more_tokens;
    if (lane.token >= p.deal.chunk_tokens) {
      lane.token -= p.deal.chunk_tokens;
      ++lane.group;
    }
  }
}

// Puts it where the lanes that quantize find it.
SKVQ_DEVICE GroupQuantizer place_quantizer(const GroupTask& group, const Range& r, float clip, Meta meta,
                                           Exponents exponents, Extremes* of_token) {
  const auto make = [&](Meta type) {
    return make_group_quantizer(r.low, r.high, r.finite, clip, group.levels, type, exponents);
  };
  const GroupQuantizer q = meta == Meta::kE4m3 ? make(Meta::kE4m3) : make(Meta::kFp16);
  of_token[group.first] = {float_bits(q.zero), float_bits(q.inverse)};
  return q;
}

// Quantizers of a chunk with one clip ratio per group, or with those that the search has found.
template <DType D, bool kSearching>
SKVQ_DEVICE void make_quantizers(const AppendParams& p, const PackTask& t, const PackScratch& s,
                                 const QuantizerDeal& lane, int first) {
  const Meta meta = p.args.cache.format.meta;
  const PackedSide& side = p.sides[static_cast<int>(t.side)];
  const bool searched = kSearching && p.args.clip_of(t.side).choices > 1;
  each_quantizer(p, side.num_groups, lane, first, [&](int g, int token) {
    const GroupTask group = s.groups[g];
    Extremes* of_token = s.extremes + token * p.deal.stride;
    Range r;
    float clip = group.clip;
    if (searched) {
      const GroupSearch& found = s.search(p.deal, token, group.first);
      r = found.range;
      clip = found.clip;
    } else {
      r = range_of_group<D>(group, of_token);
    }
    const GroupQuantizer q = place_quantizer(group, r, clip, meta, lane.exponents, of_token);
    store_group_meta(meta, t.record + side.meta_offset, side.num_groups, first + token, g, q);
  });
}

// ---- Codes ----

template <DType D>
SKVQ_DEVICE void quantize_octet(const Octet<D>& x, Extremes quantizer, int levels, std::uint32_t (&codes)[kOctet]) {
  const GroupQuantizer q{bits_float(quantizer.least), 0.0f, bits_float(quantizer.most), 0, 0};
  unroll<kOctet / 2>([&](auto i) {
    const ptx::Floats2 two = floats_at(x, i);
    codes[2 * i] = quantize_bits(two.low, q, levels);
    codes[2 * i + 1] = quantize_bits(two.high, q, levels);
  });
}

// Their lowest bytes.
SKVQ_DEVICE std::uint32_t bytes_of(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Codes of two adjacent tokens.
SKVQ_DEVICE void stage_octets(Side rows, const std::uint32_t (&a)[kOctet], const std::uint32_t (&b)[kOctet],
                              unsigned char* to) {
  if (rows == Side::kKey) {
    *reinterpret_cast<uint2*>(to) = {bytes_of(a[0], a[1], a[2], a[3]), bytes_of(a[4], a[5], a[6], a[7])};
    *reinterpret_cast<uint2*>(to + staged_at(rows, 1, 0)) = {bytes_of(b[0], b[1], b[2], b[3]),
                                                             bytes_of(b[4], b[5], b[6], b[7])};
  } else {
    *reinterpret_cast<uint4*>(to) = {bytes_of(a[0], b[0], a[1], b[1]), bytes_of(a[2], b[2], a[3], b[3]),
                                     bytes_of(a[4], b[4], a[5], b[5]), bytes_of(a[6], b[6], a[7], b[7])};
  }
}

// The work of a lane on the chunk that starts at token `first`.
template <DType D>
struct ChunkLane {
  const OctetDeal& deal;
  int first;
  int token, octet;  // of the lane in pass 0, `token` counted from `first`
  bool active;

  SKVQ_DEVICE bool has_pass(int pass) const { return first + deal.token_steps.at(pass) < kTileTokens; }
  SKVQ_DEVICE bool has_work(int pass) const { return active && token_of(pass) < kTileTokens; }
  SKVQ_DEVICE int token_of(int pass) const { return first + token + deal.token_steps.at(pass); }
  SKVQ_DEVICE int octet_of(int pass) const { return octet + deal.octet_steps.at(pass); }

  template <class LoadOne>
  SKVQ_DEVICE void load(const PackScratch& s, Octet<D> (&x)[kPasses<D>][2], LoadOne load_one) const {
    unroll<kPasses<D>>([&](auto pass) {
      if (!has_pass(pass)) return;
      // Lanes without work load what others load too.
      const unsigned char* const* rows = s.rows + min_int(token_of(pass), kTileTokens - 2);
      const int offset = octet_of(pass) * kOctet * dtype_bytes(D);
      x[pass][0] = load_one(rows[0] + offset);
      x[pass][1] = load_one(rows[1] + offset);
    });
  }
  SKVQ_DEVICE void find_extremes(const PackScratch& s, const Octet<D> (&x)[kPasses<D>][2]) const {
    Extremes* of_lane = s.extremes + token * deal.stride + octet;
    unroll<kPasses<D>>([&](auto pass) {
      if (!has_work(pass)) return;
      Extremes* e = of_lane + deal.stride_steps.at(pass);
      e[0] = extremes_of(x[pass][0]);
      e[deal.stride] = extremes_of(x[pass][1]);
    });
  }
  SKVQ_DEVICE void add_errors(const PackScratch& s, const Octet<D> (&x)[kPasses<D>][2]) const {
    const Extremes* of_lane = s.extremes + token * deal.stride;
    unroll<kPasses<D>>([&](auto pass) {
      if (!has_work(pass)) return;
      const OctetTask task = s.octets[octet_of(pass)];
      const int of_chunk = token + deal.token_steps.at(pass);
      const Extremes* quantizers = of_lane + deal.token_steps.at(pass) * deal.stride + task.group;
      add_octet_error(x[pass][0], quantizers[0], task.levels, s.search(deal, of_chunk, task.group));
      add_octet_error(x[pass][1], quantizers[deal.stride], task.levels, s.search(deal, of_chunk + 1, task.group));
    });
  }
  SKVQ_DEVICE void stage_codes(const PackScratch& s, const Octet<D> (&x)[kPasses<D>][2]) const {
    const Extremes* of_lane = s.extremes + token * deal.stride;
    unroll<kPasses<D>>([&](auto pass) {
      if (!has_work(pass)) return;
      const OctetTask task = s.octets[octet_of(pass)];
      const Extremes* quantizers = of_lane + deal.token_steps.at(pass) * deal.stride + task.group;
      std::uint32_t a[kOctet], b[kOctet];
      quantize_octet(x[pass][0], quantizers[0], task.levels, a);
      quantize_octet(x[pass][1], quantizers[deal.stride], task.levels, b);
      const unsigned at = static_cast<unsigned>(token_of(pass));
      const int step = static_cast<int>(at / 16), row = static_cast<int>(at % 16);
      stage_octets(task.rows, a, b, s.codes + task.staged + step * task.step_bytes + staged_at(task.rows, row, 0));
    });
  }
};

// Leaves in `searches`, for every group and token of a chunk, the first of the clip ratios that errs least.
template <DType D>
SKVQ_DEVICE void search_clips(const AppendParams& p, const PackTask& t, const PackScratch& s, const QuantizerDeal& lane,
                              const ChunkLane<D>& work, const Octet<D> (&x)[kPasses<D>][2]) {
  const Meta meta = p.args.cache.format.meta;
  const ClipTable& clip = p.args.clip_of(t.side);
  const int num_groups = p.sides[static_cast<int>(t.side)].num_groups;
  for (int c = 0; c <= clip.choices; ++c) {
    each_quantizer(p, num_groups, lane, work.first, [&](int g, int token) {
      const GroupTask group = s.groups[g];
      const float* choices = clip.of(t.head, num_groups, g);
      Extremes* of_token = s.extremes + token * p.deal.stride;
      GroupSearch& search = s.search(p.deal, token, group.first);
      if (c == 0) {
        search.start(range_of_group<D>(group, of_token));
      } else {
        search.settle(choices[c - 1]);
      }
      if (c == clip.choices) return;
      search.scale = place_quantizer(group, search.range, choices[c], meta, lane.exponents, of_token).scale;
      search.error = 0;
    });
    __syncwarp();
    if (c == clip.choices) return;
    work.add_errors(s, x);
    __syncwarp();
  }
}

template <DType D, bool kSearching>
SKVQ_DEVICE void quantize_tile(const AppendParams& p, const PackTask& t, const PackScratch& s) {
  const OctetDeal& deal = p.deal;
  const unsigned lane = static_cast<unsigned>(lane_index());
  const int pair = static_cast<int>(lane / static_cast<unsigned>(deal.octets));
  const int octet = static_cast<int>(lane % static_cast<unsigned>(deal.octets));
  const QuantizerDeal quantizers{static_cast<int>(lane / static_cast<unsigned>(deal.chunk_tokens)),
                                 static_cast<int>(lane % static_cast<unsigned>(deal.chunk_tokens)),
                                 p.args.cache.exponents_of(t.side, t.head)};
  for (int first = 0; first < kTileTokens; first += deal.chunk_tokens) {
    const ChunkLane<D> work{deal, first, 2 * pair, octet, pair < deal.pairs};
    Octet<D> x[kPasses<D>][2];
    if (p.vectors) {
      work.load(s, x, [](const unsigned char* from) { return load_octet<D>(from); });
    } else {
      work.load(s, x, [](const unsigned char* from) { return load_octet_by_channel<D>(from); });
    }
    work.find_extremes(s, x);
    __syncwarp();
    if constexpr (kSearching) {
      if (p.args.clip_of(t.side).choices > 1) search_clips<D>(p, t, s, quantizers, work, x);
    }
    make_quantizers<D, kSearching>(p, t, s, quantizers, first);
    __syncwarp();
    work.stage_codes(s, x);
    __syncwarp();
  }
}

// ---- The tile ----

SKVQ_DEVICE void pack_codes(const AppendParams& p, const PackTask& t, const PackScratch& s) {
  const PackedSide& packed = p.sides[static_cast<int>(t.side)];
  const int lane = lane_index();
  for (int b = 0; b < packed.num_bands; ++b) {
    const PackedBand& band = packed.bands[b];
    const StagedCodes codes(s.codes, band, lane);
    unsigned char* out = t.record + band.offset;
    if (band.low_bits == 0) {
      pack_trits(codes, band.channels, lane, reinterpret_cast<int*>(s.extremes), out);
      continue;
    }
    pack_plane_of(band.low_bits, codes, band.channels, 0, lane, out);
    if (band.high_bits == 0) continue;
    out += band.channels * kTileTokens * band.low_bits / 8;
    pack_plane_of(band.high_bits, codes, band.channels, band.low_bits, lane, out);
  }
}

// By all lanes of a warp. A tile without a page is left alone: the host cannot look at a page table on the device
// without waiting for it, so a table that is too short or holds -1 here loses the tile's tokens. Where no side has
// several clip ratios, code without the search needs a fifth fewer registers.
template <DType D, bool kSearching>
SKVQ_DEVICE void pack_tile(const AppendParams& p, const TileSlot& slot, int head, Side side, const PackScratch& s) {
  const CacheView& c = p.args.cache;
  if (slot.tile >= c.max_pages) return;
  const std::int64_t page = c.page_table[static_cast<std::int64_t>(slot.sequence) * c.max_pages + slot.tile];
  if (page < 0 || page >= c.num_pages) return;
  const PackTask task{slot, head, side, c.pages + (page * c.num_kv_heads + head) * p.record_bytes};
  prepare(p, task, s);
  quantize_tile<D, kSearching>(p, task, s);
  pack_codes(p, task, s);
}

}  // namespace skvq::cuda

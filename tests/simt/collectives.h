// Barriers of a block and collectives of a warp, with the checks that hardware does not make.
#pragma once

#include <type_traits>

#include "simt/schedule.h"

namespace simt {

// ---- __syncthreads ----

enum class Vote { kNone, kOr, kAnd, kCount };

SIMT_RUNTIME inline void check_block_barrier(const Block& b, const char* what, const Location& here) {
  const BlockBarrier& r = b.barrier;
  if (b.live != b.num_threads) {
    fail("%s at %s:%u, but %u threads of the block have returned", what, SIMT_AT(here), b.num_threads - b.live);
  }
  if (r.arrived != 0 && !same(r.here, here)) {
    fail("divergent barrier: this thread is in %s at %s:%u while %u threads wait at %s:%u", what, SIMT_AT(here),
         r.arrived, SIMT_AT(r.here));
  }
}

SIMT_RUNTIME inline void open_block_barrier(Block& b) {
  BlockBarrier& r = b.barrier;
  r.result = r.vote;
  r.arrived = 0;
  ++r.phase;
  for (unsigned w = 0; w < b.num_warps; ++w) {
    make_ready(b, b.warps[w], r.waiting[w]);
    r.waiting[w] = 0;
  }
}

__attribute__((noinline)) SIMT_RUNTIME inline int sync_block(const char* what, Vote vote, int predicate,
                                                             Location here) {
  Fiber& f = *current;
  Block& b = *f.block;
  BlockBarrier& r = b.barrier;
  if (is_skipped(here)) return 0;
  check_block_barrier(b, what, here);
  if (r.arrived == 0) {
    r.here = here;
    r.vote = vote == Vote::kAnd ? 1 : 0;
  }
  const int yes = predicate != 0 ? 1 : 0;
  r.vote = vote == Vote::kAnd ? r.vote & yes : vote == Vote::kOr ? r.vote | yes : r.vote + yes;
  Token& token = r.tokens[r.phase & 1];
  release(&token);
  if (++r.arrived == b.num_threads) {
    open_block_barrier(b);
    let_others(f);
  } else {
    r.waiting[f.warp->index] |= 1u << f.lane;
    wait(f, what, here, 0);
  }
  acquire(&token);
  return r.result;
}

// ---- collectives of a warp ----

struct Collective {
  const char* what;
  unsigned mask;
  Location here;
  bool whole_warp;     // ".aligned": all lanes at once
  bool orders_memory;  // only __syncwarp does
};

SIMT_RUNTIME inline void check_collective(const Fiber& f, const Collective& c) {
  const Warp& w = *f.warp;
  if ((c.mask >> f.lane & 1) == 0) {
    fail("%s at %s:%u: mask %08x does not name the calling lane", c.what, SIMT_AT(c.here), c.mask);
  }
  if (c.whole_warp && (w.lanes != ~0u || c.mask != ~0u)) {
    fail("%s at %s:%u needs a warp of 32 lanes, found lanes %08x", c.what, SIMT_AT(c.here), w.lanes & c.mask);
  }
  if (const unsigned gone = c.mask & ~w.live; gone != 0) {
    fail("%s at %s:%u: mask %08x names lanes %08x, which have returned or never were", c.what, SIMT_AT(c.here), c.mask,
         gone);
  }
}

SIMT_RUNTIME inline Rendezvous& join(Fiber& f, const Collective& c) {
  Warp& w = *f.warp;
  check_collective(f, c);
  for (unsigned i = 0; i < w.num_open; ++i) {
    Rendezvous& r = w.open[i];
    const bool alike = r.mask == c.mask;
    // Lanes may wait for this one while it does something else with others, as long as it does not wait for them.
    if (!alike && (c.mask & r.arrived) == 0) continue;
    if (!alike || r.what != c.what || !same(r.here, c.here)) {
      fail("divergent warp: %s at %s:%u for lanes %08x while lanes %08x wait in %s at %s:%u for lanes %08x", c.what,
           SIMT_AT(c.here), c.mask, r.arrived, r.what, SIMT_AT(r.here), r.mask);
    }
    return r;
  }
  if (w.num_open == kMaxOpen) fail("more than %u collectives of one warp are open", kMaxOpen);
  Rendezvous& r = w.open[w.num_open++];
  r = {c.what, c.here, c.mask, 0};
  return r;
}

// Each lane leaves its operand; the one that comes last works the results out for all.
template <class Out, class In, class Combine>
SIMT_RUNTIME Out collective(const Collective& c, const In& in, Combine combine) {
  static_assert(sizeof(In) <= kSlotBytes && sizeof(Out) <= kSlotBytes);
  static_assert(std::is_trivially_copyable_v<In> && std::is_trivially_copyable_v<Out>);
  Fiber& f = *current;
  Warp& w = *f.warp;
  Rendezvous& r = join(f, c);
  *reinterpret_cast<In*>(w.in[f.lane]) = in;
  r.arrived |= 1u << f.lane;
  Token& token = w.tokens[w.phase & 1];
  if (c.orders_memory) release(&token);
  if (r.arrived == c.mask) {
    combine(w, c.mask);
    r = w.open[--w.num_open];
    if (c.orders_memory) ++w.phase;
    make_ready(*f.block, w, c.mask & ~(1u << f.lane));
    let_others(f);
  } else {
    wait(f, c.what, c.here, c.mask);
  }
  if (c.orders_memory) acquire(&token);
  return *reinterpret_cast<const Out*>(w.out[f.lane]);
}
template <class T>
SIMT_RUNTIME inline T& in_of(Warp& w, unsigned lane) {
  return *reinterpret_cast<T*>(w.in[lane]);
}
template <class T>
SIMT_RUNTIME inline T& out_of(Warp& w, unsigned lane) {
  return *reinterpret_cast<T*>(w.out[lane]);
}

__attribute__((noinline)) SIMT_RUNTIME inline void sync_warp(unsigned mask, Location here) {
  if (is_skipped(here)) return;
  collective<int>({"__syncwarp", mask, here, false, true}, 0, [](Warp&, unsigned) SIMT_RUNTIME {});
}

// ---- shuffles and reductions ----

enum class Shuffle { kIndex, kUp, kDown, kXor };

template <class T>
struct ShuffleOperand {
  T value;
  int argument, width;
};

// The lane that `lane` reads; its own where the argument leads out of its segment.
SIMT_RUNTIME inline unsigned source_lane(Shuffle mode, int lane, int argument, int width) {
  const int base = lane & ~(width - 1), offset = lane & (width - 1);
  int from = 0;
  switch (mode) {
    case Shuffle::kIndex:
      from = argument & (width - 1);
      break;
    case Shuffle::kUp:
      from = offset - argument;
      break;
    case Shuffle::kDown:
      from = offset + argument;
      break;
    case Shuffle::kXor:
      from = offset ^ argument;
      break;
  }
  return static_cast<unsigned>(from < 0 || from >= width ? lane : base + from);
}

template <Shuffle mode, class T>
SIMT_RUNTIME T shuffle(const char* what, unsigned mask, T value, int argument, int width, Location here) {
  static_assert(std::is_arithmetic_v<T>, "CUDA shuffles numbers only");
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("%s at %s:%u: width %d is no power of two up to 32", what, SIMT_AT(here), width);
  }
  using Operand = ShuffleOperand<T>;
  return collective<T>({what, mask, here, false, false}, Operand{value, argument, width},
                       [](Warp& w, unsigned lanes) SIMT_RUNTIME {
                         for (unsigned left = lanes; left != 0; left &= left - 1) {
                           const unsigned lane = lowest_bit(left);
                           const Operand& in = in_of<Operand>(w, lane);
                           const unsigned from = source_lane(mode, static_cast<int>(lane), in.argument, in.width);
                           if ((lanes >> from & 1) == 0) {
                             fail("shuffle: lane %u reads lane %u, which mask %08x does not name", lane, from, lanes);
                           }
                           out_of<T>(w, lane) = in_of<Operand>(w, from).value;
                         }
                       });
}

template <class T, class Operation>
SIMT_RUNTIME T reduce(const char* what, unsigned mask, T value, Location here, Operation) {
  return collective<T>({what, mask, here, false, false}, value, [](Warp& w, unsigned lanes) SIMT_RUNTIME {
    T sum = in_of<T>(w, lowest_bit(lanes));
    for (unsigned left = lanes & (lanes - 1); left != 0; left &= left - 1) {
      sum = Operation::apply(sum, in_of<T>(w, lowest_bit(left)));
    }
    for (unsigned left = lanes; left != 0; left &= left - 1) out_of<T>(w, lowest_bit(left)) = sum;
  });
}

SIMT_RUNTIME inline unsigned ballot(const char* what, unsigned mask, bool predicate, Location here) {
  return collective<unsigned>({what, mask, here, false, false}, predicate, [](Warp& w, unsigned lanes) SIMT_RUNTIME {
    unsigned votes = 0;
    for (unsigned left = lanes; left != 0; left &= left - 1) {
      const unsigned lane = lowest_bit(left);
      if (in_of<bool>(w, lane)) votes |= 1u << lane;
    }
    for (unsigned left = lanes; left != 0; left &= left - 1) out_of<unsigned>(w, lowest_bit(left)) = votes;
  });
}

}  // namespace simt

// mbarrier and cp.async.bulk: copies that announce themselves at a barrier in shared memory.
//
// Bytes arrive when no thread can go on without them (or at once, see config.h). Until then the destination is
// scribbled over and poisoned. For ThreadSanitizer a thread of its own writes them at issue, and whoever waited for the
// barrier comes after it. Each warp has such a thread, so that no warp's copies order what another one does.
#pragma once

#include "simt/copies.h"

namespace simt {

// What the word in memory holds, to notice who writes over it.
SIMT_RUNTIME inline std::uint64_t barrier_word(unsigned index) {
  return 0x6d62617272696572ull + index;
}

SIMT_RUNTIME inline PhaseBarrier& barrier_at(Block& b, const std::uint64_t* word, const char* what,
                                             const Location& here, void* caller) {
  for (unsigned i = 0; i < b.num_barriers; ++i) {
    if (b.barriers[i].word != word) continue;
    saw_read(word, sizeof *word, caller);
    if (*word != barrier_word(i)) fail("%s at %s:%u: the mbarrier was written over", what, SIMT_AT(here));
    return b.barriers[i];
  }
  fail("%s at %s:%u: there is no mbarrier at %p", what, SIMT_AT(here), static_cast<const void*>(word));
}

__attribute__((noinline)) SIMT_RUNTIME inline void mbarrier_init(std::uint64_t* word, unsigned arrivals,
                                                                 Location here) {
  Block& b = *current->block;
  if (!is_shared(b, word, sizeof *word) || !is_aligned(word, sizeof *word)) {
    fail("mbarrier.init at %s:%u: %p is not 8 aligned bytes of shared memory", SIMT_AT(here), static_cast<void*>(word));
  }
  for (unsigned i = 0; i < b.num_barriers; ++i) {
    if (b.barriers[i].word == word) fail("mbarrier.init at %s:%u: it is an mbarrier already", SIMT_AT(here));
  }
  if (arrivals == 0) fail("mbarrier.init at %s:%u: 0 arrivals", SIMT_AT(here));
  if (b.num_barriers == kMaxBarriers) fail("more than %u mbarriers", kMaxBarriers);
  saw_write(word, sizeof *word, SIMT_CALLER);
  PhaseBarrier& m = b.barriers[b.num_barriers];
  fill_bytes(&m, sizeof m, 0);
  m.word = word;
  m.expected = m.pending = arrivals;
  *word = barrier_word(b.num_barriers++);
}

SIMT_RUNTIME inline void complete_phase(Block& b, PhaseBarrier& m) {
  if (m.pending != 0 || m.bytes != 0) return;
  m.pending = m.expected;
  ++m.phase;
  m.num_waiting = 0;
  for (unsigned w = 0; w < b.num_warps; ++w) {
    make_ready(b, b.warps[w], m.waiting[w]);
    m.waiting[w] = 0;
  }
}

__attribute__((noinline)) SIMT_RUNTIME inline void mbarrier_arrive_expect(std::uint64_t* word, unsigned bytes,
                                                                          Location here) {
  Fiber& f = *current;
  PhaseBarrier& m = barrier_at(*f.block, word, "mbarrier.arrive", here, SIMT_CALLER);
  if (m.pending == 0) fail("mbarrier.arrive at %s:%u: more arrivals than %u", SIMT_AT(here), m.expected);
  release(&m.tokens[m.phase & 1]);
  m.bytes += bytes;
  --m.pending;
  complete_phase(*f.block, m);
  let_others(f);
}

// Until the phase of this parity is complete. A thread that comes two phases late waits for the wrong one, as on
// hardware.
__attribute__((noinline)) SIMT_RUNTIME inline void mbarrier_wait(std::uint64_t* word, unsigned parity, Location here) {
  if (is_skipped(here)) return;
  Fiber& f = *current;
  PhaseBarrier& m = barrier_at(*f.block, word, "mbarrier.try_wait", here, SIMT_CALLER);
  if (parity > 1) fail("mbarrier.try_wait at %s:%u: parity %u", SIMT_AT(here), parity);
  while ((m.phase & 1) == parity) {
    ++m.num_waiting;
    m.waiting[f.warp->index] |= 1u << f.lane;
    wait(f, parity == 0 ? "mbarrier.try_wait of parity 0" : "mbarrier.try_wait of parity 1", here, 0);
  }
  acquire(&m.tokens[parity]);
  let_others(f);
}

// ---- cp.async.bulk ----

SIMT_RUNTIME inline void see_bulk(Warp& w, const BulkCopy& c, void* caller) {
  release(&w.bulk_token);
  void* issuer = this_thread();
  become_thread(w.bulk_thread);
  acquire(&w.bulk_token);
  saw_read(c.from, c.bytes, caller);
  saw_write(c.to, c.bytes, caller);
  release(&c.barrier->tokens[c.barrier->phase & 1]);
  become_thread(issuer);
}

SIMT_RUNTIME inline void arrive(Block& b, const BulkCopy& c) {
  unpoison(c.to, c.bytes);
  copy_bytes(c.to, c.from, c.bytes);
  c.barrier->bytes -= c.bytes;
  complete_phase(b, *c.barrier);
}

SIMT_RUNTIME inline void arrive_at(Block& b, const PhaseBarrier& m) {
  unsigned kept = 0;
  const unsigned all = b.num_bulk;
  for (unsigned i = 0; i < all; ++i) {
    if (b.bulk[i].barrier != &m) {
      b.bulk[kept++] = b.bulk[i];
      continue;
    }
    const BulkCopy c = b.bulk[i];
    arrive(b, c);
  }
  b.num_bulk = kept;
}

SIMT_RUNTIME inline bool deliver_late_copies(Block& b) {
  const unsigned skip = chance_decides() && b.num_bulk != 0 ? machine.random.below(b.num_bulk) : 0;
  for (unsigned i = 0; i < b.num_bulk; ++i) {
    const PhaseBarrier& m = *b.bulk[(i + skip) % b.num_bulk].barrier;
    if (m.num_waiting == 0) continue;
    arrive_at(b, m);
    return true;
  }
  return false;
}

SIMT_RUNTIME inline void check_no_overlap(const Block& b, const unsigned char* to, std::size_t bytes,
                                          const Location& here) {
  for (unsigned i = 0; i < b.num_bulk; ++i) {
    const BulkCopy& c = b.bulk[i];
    if (to < c.to + c.bytes && c.to < to + bytes) {
      fail("cp.async.bulk at %s:%u: the copy that %s:%u began to this destination is under way", SIMT_AT(here),
           SIMT_AT(c.here));
    }
  }
}

__attribute__((noinline)) SIMT_RUNTIME inline void cp_async_bulk(void* to, const void* from, unsigned bytes,
                                                                 std::uint64_t* word, Location here) {
  Fiber& f = *current;
  Block& b = *f.block;
  PhaseBarrier& m = barrier_at(b, word, "cp.async.bulk", here, SIMT_CALLER);
  if (bytes == 0 || bytes % 16 != 0) {
    fail("cp.async.bulk at %s:%u: %u bytes are no multiple of 16", SIMT_AT(here), bytes);
  }
  check_no_overlap(b, static_cast<unsigned char*>(to), bytes, here);
  check_copy(b, "cp.async.bulk", to, from, bytes, bytes, 16, here);
  if (b.num_bulk == kMaxBulk) fail("cp.async.bulk at %s:%u: more than %u are under way", SIMT_AT(here), kMaxBulk);
  const BulkCopy c{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, &m, here};
  see_bulk(*f.warp, c, SIMT_CALLER);
  if (arrives_early()) {
    arrive(b, c);
  } else {
    fill_bytes(c.to, c.bytes, kUndefined);
    poison(c.to, c.bytes);
    b.bulk[b.num_bulk++] = c;
  }
  let_others(f);
}

}  // namespace simt

// cp.async: copies from global to shared memory that a thread waits for in groups.
//
// Between issue and wait the destination holds neither the old bytes nor the new ones: it is scribbled over and, under
// AddressSanitizer, poisoned. ThreadSanitizer sees a write at either end. A kernel that is right cannot tell late
// copies from early ones.
#pragma once

#include <cstdlib>

#include "simt/schedule.h"
#include "simt/shared.h"

namespace simt {

SIMT_RUNTIME inline bool arrives_early() {
  return machine.config.async == Async::kEarly || (machine.config.async == Async::kRandom && machine.random.coin());
}

SIMT_RUNTIME inline void check_copy(const Block& b, const char* what, const void* to, const void* from,
                                    std::size_t bytes, std::size_t source_bytes, std::size_t alignment,
                                    const Location& here) {
  if (!is_shared(b, to, bytes)) {
    fail("%s at %s:%u: the destination is not in the shared memory of this block", what, SIMT_AT(here));
  }
  if (!is_aligned(to, alignment) || (source_bytes != 0 && !is_aligned(from, alignment))) {
    fail("%s at %s:%u: from %p to %p is not aligned to %zu bytes", what, SIMT_AT(here), from, to, alignment);
  }
  if (source_bytes != 0 && is_shared(b, from, 1)) {
    fail("%s at %s:%u: the source is in shared memory", what, SIMT_AT(here));
  }
  if (is_poisoned(to, bytes)) {
    fail("%s at %s:%u: a copy to this destination is under way", what, SIMT_AT(here));
  }
  if (is_poisoned(from, source_bytes)) {
    fail("%s at %s:%u: the source is out of bounds", what, SIMT_AT(here));
  }
}

SIMT_RUNTIME inline void move(const AsyncCopy& c) {
  copy_bytes(c.to, c.from, c.source_bytes);
  fill_bytes(c.to + c.source_bytes, c.bytes - c.source_bytes, 0);
}

SIMT_RUNTIME inline AsyncCopy& new_copy(Fiber& f) {
  if (f.num_copies == f.copies_capacity) {
    WithoutHistory quiet;
    const unsigned capacity = f.copies_capacity == 0 ? 64 : 2 * f.copies_capacity;
    void* grown = std::realloc(f.copies, capacity * sizeof(AsyncCopy));
    if (grown == nullptr) fail("the host has no memory for %u copies", capacity);
    f.copies = static_cast<AsyncCopy*>(grown);
    f.copies_capacity = capacity;
  }
  return f.copies[f.num_copies++];
}

__attribute__((noinline)) SIMT_RUNTIME inline void cp_async(void* to, const void* from, int bytes, int source_bytes,
                                                            Location here) {
  Fiber& f = *current;
  if (source_bytes < 0 || source_bytes > bytes) {
    fail("cp.async at %s:%u: %d source bytes of %d", SIMT_AT(here), source_bytes, bytes);
  }
  check_copy(*f.block, "cp.async", to, from, static_cast<std::size_t>(bytes), static_cast<std::size_t>(source_bytes),
             static_cast<std::size_t>(bytes), here);
  AsyncCopy& c = new_copy(f);
  c = {static_cast<unsigned char*>(to),
       static_cast<const unsigned char*>(from),
       static_cast<unsigned>(bytes),
       static_cast<unsigned>(source_bytes),
       arrives_early(),
       here};
  saw_read(c.from, c.source_bytes, SIMT_CALLER);
  saw_write(c.to, c.bytes, SIMT_CALLER);
  if (c.arrived) {
    move(c);
  } else {
    fill_bytes(c.to, c.bytes, kUndefined);
    poison(c.to, c.bytes);
  }
}

SIMT_RUNTIME inline void cp_async_commit(Location here) {
  Fiber& f = *current;
  if (f.num_groups == kMaxGroups)
    fail("cp.async.commit_group at %s:%u: more than %u groups", SIMT_AT(here), kMaxGroups);
  f.group_end[f.num_groups++] = f.num_copies;
}

__attribute__((noinline)) SIMT_RUNTIME inline void cp_async_wait(int pending) {
  Fiber& f = *current;
  const unsigned keep = static_cast<unsigned>(pending);
  if (f.num_groups <= keep) return;
  const unsigned done = f.num_groups - keep, copies = f.group_end[done - 1];
  for (unsigned i = 0; i < copies; ++i) {
    const AsyncCopy& c = f.copies[i];
    saw_read(c.from, c.source_bytes, SIMT_CALLER);
    saw_write(c.to, c.bytes, SIMT_CALLER);
    if (c.arrived) continue;
    unpoison(c.to, c.bytes);
    move(c);
  }
  for (unsigned i = copies; i < f.num_copies; ++i) f.copies[i - copies] = f.copies[i];
  f.num_copies -= copies;
  for (unsigned i = 0; i < keep; ++i) f.group_end[i] = f.group_end[done + i] - copies;
  f.num_groups = keep;
}

}  // namespace simt

// The state of the emulated machine: one block at a time, one fiber for each of its threads.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "simt/config.h"
#include "simt/cuda_types.h"
#include "simt/switch.h"

namespace simt {

inline constexpr unsigned kLanes = 32;
inline constexpr unsigned kMaxWarps = 32;
inline constexpr unsigned kMaxOpen = 8;     // collectives of one warp that some lanes wait in
inline constexpr unsigned kMaxShared = 16;  // SKVQ_SHARED objects of a block
inline constexpr unsigned kMaxBarriers = 128;
inline constexpr unsigned kMaxBulk = 256;
inline constexpr unsigned kMaxGroups = 64;
inline constexpr unsigned kMaxObserved = 8;
inline constexpr std::size_t kSlotBytes = 64;

struct Block;
struct Warp;

// What a thread waits in, for reports.
struct Wait {
  const char* what;  // null where the thread can go on
  Location here;
  unsigned mask;  // lanes it waits for; 0: not lanes
};

// The widest fence a thread has passed.
enum class Fence : std::uint8_t { kNone, kBlock, kDevice };

// cp.async
struct AsyncCopy {
  unsigned char* to;
  const unsigned char* from;
  unsigned bytes, source_bytes;
  bool arrived;
  Location here;
};

struct Fiber {
  void* stack_pointer;
  uint3 index;  // threadIdx
  Block* block;
  Warp* warp;
  unsigned lane;
  Wait wait;
  AsyncCopy* copies;  // not waited for, oldest first
  unsigned num_copies, copies_capacity;
  unsigned group_end[kMaxGroups];  // index in `copies` after each committed group
  unsigned num_groups;
  Fence fence;
  void* observed[kMaxObserved];  // atomics since the last fence
  unsigned num_observed;
  Stack stack;
  void* fake_stack;  // AddressSanitizer's
  void* thread;      // ThreadSanitizer's
};

// Lanes on their way through one collective.
struct Rendezvous {
  const char* what;
  Location here;
  unsigned mask, arrived;
};

struct Warp {
  unsigned index, lanes, live, ready;
  unsigned num_open;
  Rendezvous open[kMaxOpen];
  std::uint64_t phase;  // of __syncwarp
  Token tokens[2];
  void* bulk_thread;  // ThreadSanitizer's: who writes what the warp's bulk copies bring
  Token bulk_token;
  alignas(16) unsigned char in[kLanes][kSlotBytes];
  alignas(16) unsigned char out[kLanes][kSlotBytes];
};

// __syncthreads
struct BlockBarrier {
  unsigned arrived;
  Location here;
  unsigned waiting[kMaxWarps];  // lanes
  std::uint64_t phase;
  int vote, result;
  Token tokens[2];
};

// mbarrier
struct PhaseBarrier {
  std::uint64_t* word;  // in shared memory
  unsigned expected, pending;
  std::int64_t bytes;  // announced and not yet arrived
  std::uint64_t phase;
  unsigned num_waiting;
  unsigned waiting[kMaxWarps];  // lanes
  Token tokens[2];
};

// cp.async.bulk
struct BulkCopy {
  unsigned char* to;
  const unsigned char* from;
  unsigned bytes;
  PhaseBarrier* barrier;
  Location here;
};

struct SharedObject {
  const void* key;
  unsigned char* data;
  std::size_t bytes;
};

struct Block {
  uint3 index;
  dim3 threads, blocks;
  unsigned num_threads, num_warps, live, ready_warps;
  Warp warps[kMaxWarps];
  Warp* last_warp;  // that ran
  BlockBarrier barrier;
  PhaseBarrier barriers[kMaxBarriers];
  unsigned num_barriers;
  BulkCopy bulk[kMaxBulk];  // under way
  unsigned num_bulk;
  SharedObject dynamic;
  SharedObject shared[kMaxShared];
  unsigned num_shared;
  Fiber* fibers;
  unsigned num_fibers;  // allocated
};

struct Machine {
  Block* block;  // null where nothing runs
  void* stack_pointer;
  Stack stack;
  void* fake_stack;
  void* thread;
  void (*invoke)(const void* call);
  const void* call;
  Config config;
  Random random;
  Token begin, end;  // of the launch
  bool failed;
  char error[2048];
};

inline constinit Machine machine{};
inline constinit Fiber* current = nullptr;  // null in host code

SIMT_RUNTIME inline const char* file_name(const char* path) {
  const char* name = path;
  for (const char* p = path; *p != '\0'; ++p) {
    if (*p == '/') name = p + 1;
  }
  return name;
}
SIMT_RUNTIME inline bool same(const Location& a, const Location& b) {
  if (a.line != b.line) return false;
  const char *p = a.file, *q = b.file;
  while (p != q && *p == *q && *p != '\0') ++p, ++q;
  return p == q || *p == *q;
}
SIMT_RUNTIME inline bool is_skipped(const Location& here) {
  if (here.line != machine.config.skipped_line) return false;
  const char *p = file_name(here.file), *q = machine.config.skipped_file;
  while (*p == *q && *p != '\0') ++p, ++q;
  return *p == *q;
}
// Two arguments for a format "%s:%u".
#define SIMT_AT(location) ::simt::file_name((location).file), (location).line

SIMT_RUNTIME inline unsigned lowest_bit(unsigned mask) {
  return static_cast<unsigned>(__builtin_ctz(mask));
}
SIMT_RUNTIME inline unsigned count_bits(unsigned mask) {
  return static_cast<unsigned>(__builtin_popcount(mask));
}

SIMT_RUNTIME inline void switch_to_host(void** save, void** fake_stack) {
  current = nullptr;
  become_thread(machine.thread);
  leave_stack(fake_stack, machine.stack);
  switch_stacks(save, machine.stack_pointer);
}
SIMT_RUNTIME inline void switch_to_fiber(void** save, void** fake_stack, Fiber& f) {
  current = &f;
  become_thread(f.thread);
  leave_stack(fake_stack, f.stack);
  switch_stacks(save, f.stack_pointer);
}

// Ends the launch: launch() throws, the threads are dropped where they stand.
__attribute__((noinline, cold, format(printf, 1, 2))) [[noreturn]] SIMT_RUNTIME inline void fail(const char* format,
                                                                                                 ...) {
  const Fiber& f = *current;
  const uint3 &b = f.block->index, &t = f.index;
  const int used = std::snprintf(machine.error, sizeof machine.error,
                                 "block (%u, %u, %u) thread (%u, %u, %u), warp %u lane %u: ", b.x, b.y, b.z, t.x, t.y,
                                 t.z, f.warp->index, f.lane);
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(machine.error + used, sizeof machine.error - used, format, arguments);
  va_end(arguments);
  machine.failed = true;
  release(&machine.end);
  void* dropped;
  switch_to_host(&dropped, nullptr);
  __builtin_unreachable();
}

}  // namespace simt

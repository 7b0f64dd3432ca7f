// What the sanitizers are told: which fiber runs, what memory is not there yet, what happens before what.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define SIMT_ASAN 0
#endif

#if defined(__SANITIZE_THREAD__)
#define SIMT_TSAN 1
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range_pc(void* address, unsigned long bytes, void* caller);
void __tsan_write_range_pc(void* address, unsigned long bytes, void* caller);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#else
#define SIMT_TSAN 0
#endif

// The emulator itself is not instrumented: its fibers share its structures by design. So it calls nothing of the
// standard library on the way of a kernel that runs well; copies and fills are loops of its own.
#define SIMT_RUNTIME __attribute__((no_sanitize("address,thread,undefined")))

namespace simt {

// ---- memory that is allocated but must not be touched yet ----

SIMT_RUNTIME inline void poison([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if SIMT_ASAN
  __asan_poison_memory_region(p, bytes);
#endif
}
SIMT_RUNTIME inline void unpoison([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if SIMT_ASAN
  __asan_unpoison_memory_region(p, bytes);
#endif
}
SIMT_RUNTIME inline bool is_poisoned([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if SIMT_ASAN
  return bytes != 0 && __asan_region_is_poisoned(const_cast<void*>(p), bytes) != nullptr;
#else
  return false;
#endif
}

// Volatile, so that the compiler makes no memset of it, which sanitizers would see.
SIMT_RUNTIME inline void fill_bytes(void* to, std::size_t bytes, unsigned char value) {
  volatile unsigned char* p = static_cast<unsigned char*>(to);
  for (std::size_t i = 0; i < bytes; ++i) p[i] = value;
}
SIMT_RUNTIME inline void copy_bytes(void* to, const void* from, std::size_t bytes) {
  volatile unsigned char* p = static_cast<unsigned char*>(to);
  for (std::size_t i = 0; i < bytes; ++i) p[i] = static_cast<const unsigned char*>(from)[i];
}

// ---- what happens before what: only what CUDA promises ----

// A place that orders memory accesses; ThreadSanitizer tells them apart by their eight bytes.
struct Token {
  std::uint64_t unused;
};
SIMT_RUNTIME inline void release([[maybe_unused]] void* token) {
#if SIMT_TSAN
  __tsan_release(token);
#endif
}
SIMT_RUNTIME inline void acquire([[maybe_unused]] void* token) {
#if SIMT_TSAN
  __tsan_acquire(token);
#endif
}

// Accesses that the emulator makes on behalf of the kernel function that called at `caller`.
SIMT_RUNTIME inline void saw_read([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes,
                                  [[maybe_unused]] void* caller) {
#if SIMT_TSAN
  __tsan_read_range_pc(const_cast<void*>(p), bytes, caller);
#endif
}
SIMT_RUNTIME inline void saw_write([[maybe_unused]] void* p, [[maybe_unused]] std::size_t bytes,
                                   [[maybe_unused]] void* caller) {
#if SIMT_TSAN
  __tsan_write_range_pc(p, bytes, caller);
#endif
}
#define SIMT_CALLER __builtin_return_address(0)

// What is allocated or freed in its scope has no history.
struct WithoutHistory {
#if SIMT_TSAN
  SIMT_RUNTIME WithoutHistory() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  SIMT_RUNTIME ~WithoutHistory() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  WithoutHistory() {}
#endif
};

// ---- ThreadSanitizer's idea of a thread ----

SIMT_RUNTIME inline void* this_thread() {
#if SIMT_TSAN
  return __tsan_get_current_fiber();
#else
  return nullptr;
#endif
}
SIMT_RUNTIME inline void become_thread([[maybe_unused]] void* thread) {
#if SIMT_TSAN
  __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
#endif
}
SIMT_RUNTIME inline void make_thread([[maybe_unused]] void** thread, [[maybe_unused]] const char* name) {
#if SIMT_TSAN
  if (*thread == nullptr) *thread = __tsan_create_fiber(0);
  __tsan_set_fiber_name(*thread, name);
#endif
}
SIMT_RUNTIME inline void drop_thread([[maybe_unused]] void** thread) {
#if SIMT_TSAN
  if (*thread != nullptr) __tsan_destroy_fiber(*thread);
  *thread = nullptr;
#endif
}

// ---- AddressSanitizer's idea of a stack ----

struct Stack {
  const void* low;
  std::size_t bytes;
};
// `kept` is null where the stack that is left will not be used again.
SIMT_RUNTIME inline void leave_stack([[maybe_unused]] void** kept, [[maybe_unused]] const Stack& next) {
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(kept, next.low, next.bytes);
#endif
}
SIMT_RUNTIME inline void enter_stack([[maybe_unused]] void* kept, [[maybe_unused]] Stack* previous) {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(kept, previous ? &previous->low : nullptr, previous ? &previous->bytes : nullptr);
#endif
}

}  // namespace simt

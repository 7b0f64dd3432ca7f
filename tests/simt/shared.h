// Shared memory: heap blocks of exactly the size that was asked for, so that AddressSanitizer sees their ends.
#pragma once

#include <cstdlib>

#include "simt/machine.h"

namespace simt {

inline constexpr std::size_t kMaxSharedBytes = 227 * 1024;
inline constexpr unsigned char kUndefined = 0xff;  // NaN in every floating-point format

SIMT_RUNTIME inline unsigned char* allocate_shared(std::size_t bytes, std::size_t alignment) {
  WithoutHistory quiet;
  void* p = nullptr;
  if (posix_memalign(&p, alignment, bytes) != 0) return nullptr;
  fill_bytes(p, bytes, kUndefined);
  return static_cast<unsigned char*>(p);
}
SIMT_RUNTIME inline void free_shared(Block& b) {
  WithoutHistory quiet;
  for (unsigned i = 0; i < b.num_shared; ++i) std::free(b.shared[i].data);
  b.num_shared = 0;
  std::free(b.dynamic.data);
  b.dynamic = {};
}

SIMT_RUNTIME inline std::size_t shared_bytes(const Block& b) {
  std::size_t bytes = b.dynamic.bytes;
  for (unsigned i = 0; i < b.num_shared; ++i) bytes += b.shared[i].bytes;
  return bytes;
}

__attribute__((noinline)) SIMT_RUNTIME inline unsigned char* shared_object(const void* key, std::size_t bytes,
                                                                           std::size_t alignment) {
  Block& b = *current->block;
  for (unsigned i = 0; i < b.num_shared; ++i) {
    if (b.shared[i].key == key) return b.shared[i].data;
  }
  if (b.num_shared == kMaxShared) fail("more than %u objects in shared memory", kMaxShared);
  if (shared_bytes(b) + bytes > kMaxSharedBytes) {
    fail("%zu bytes of shared memory, %zu of them dynamic: a block has at most %zu", shared_bytes(b) + bytes,
         b.dynamic.bytes, kMaxSharedBytes);
  }
  SharedObject& object = b.shared[b.num_shared++];
  object = {key, allocate_shared(bytes, alignment < 16 ? 16 : alignment), bytes};
  if (object.data == nullptr) fail("the host has no memory for shared memory");
  return object.data;
}

// `Place` is a type of its own for each declaration.
template <class T, class Place>
struct SharedKey {
  static inline const char here = 0;
};
template <class T, class Place>
SIMT_RUNTIME inline T& shared(Place) {
  return *reinterpret_cast<T*>(shared_object(&SharedKey<T, Place>::here, sizeof(T), alignof(T)));
}

SIMT_RUNTIME inline bool is_shared(const Block& b, const void* p, std::size_t bytes) {
  const unsigned char* first = static_cast<const unsigned char*>(p);
  const auto holds = [&](const SharedObject& object) SIMT_RUNTIME {
    return object.data != nullptr && first >= object.data && first + bytes <= object.data + object.bytes;
  };
  if (holds(b.dynamic)) return true;
  for (unsigned i = 0; i < b.num_shared; ++i) {
    if (holds(b.shared[i])) return true;
  }
  return false;
}
SIMT_RUNTIME inline bool is_aligned(const void* p, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(p) % alignment == 0;
}

}  // namespace simt

#define SKVQ_SHARED(T, name) T& name = ::simt::shared<T>([] {})
#define SKVQ_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::current->block->dynamic.data

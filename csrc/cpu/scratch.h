// Memory in which a thread works on one item of decode attention.
#pragma once

#include <memory>
#include <new>
#include <utility>

#include "cpu/decode_plan.h"

namespace skvq::cpu {

struct FreeAligned {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
template <class T>
using Aligned = std::unique_ptr<T[], FreeAligned>;
template <class T>
Aligned<T> aligned(std::size_t n) {
  return Aligned<T>(new (std::align_val_t{64}) T[n]);
}

// Memory of one thread that is kept for the next item and the next call: asking the system for it each time takes
// longer than a short context. At most 0.35 MB, at head_dim 512.
class Arena {
 public:
  void reserve(std::size_t bytes) {
    if (bytes > size_) bytes_ = aligned<std::uint8_t>(size_ = bytes);
    used_ = 0;
  }
  template <class T>
  T* take(std::size_t n) {
    return reinterpret_cast<T*>(bytes_.get() + std::exchange(used_, used_ + padded(n * sizeof(T))));
  }
  static std::size_t padded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  Aligned<std::uint8_t> bytes_;
  std::size_t size_ = 0, used_ = 0;
};

inline Scratch scratch_for(const CacheView& c, std::size_t tile_bytes) {
  thread_local Arena arena;
  const std::size_t d = static_cast<std::size_t>(c.head_dim), q = d * kRowsPerItem;
  const std::size_t record = c.format.record_bytes(), codes = 2 * 16 * d;
  arena.reserve(q * sizeof(float) + 2 * q + Arena::padded(tile_bytes) + Arena::padded(record) + codes);
  return {arena.take<float>(q), arena.take<std::int8_t>(2 * q), arena.take<std::uint8_t>(tile_bytes),
          arena.take<std::uint8_t>(record), arena.take<std::uint8_t>(codes)};
}

}  // namespace skvq::cpu

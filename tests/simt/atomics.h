// Fences and atomics. Atomics order nothing by themselves: what a thread wrote before a fence is visible to whoever
// reads its later atomic and then passes a fence too (PTX ISA, "Memory Consistency Model", release and acquire
// patterns).
#pragma once

#include <type_traits>

#include "simt/schedule.h"
#include "simt/shared.h"

namespace simt {

SIMT_RUNTIME inline void fence(Fence width) {
  Fiber& f = *current;
  if (width > f.fence) f.fence = width;
  for (unsigned i = 0; i < f.num_observed; ++i) acquire(f.observed[i]);
  f.num_observed = 0;
}

SIMT_RUNTIME inline void before_atomic(void* p) {
  const Fiber& f = *current;
  if (f.fence == Fence::kDevice || (f.fence == Fence::kBlock && is_shared(*f.block, p, 1))) release(p);
}
SIMT_RUNTIME inline void after_atomic(void* p) {
  Fiber& f = *current;
  if (f.num_observed == kMaxObserved) {  // forget the oldest: at worst a report where there is no race
    for (unsigned i = 1; i < kMaxObserved; ++i) f.observed[i - 1] = f.observed[i];
    --f.num_observed;
  }
  f.observed[f.num_observed++] = p;
  let_others(f);
}

// Instrumented: sanitizers check the address, and see an atomic access.
template <class T, class Operation>
T atomic(T* p, Operation operation) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  before_atomic(p);
  Bits* word = reinterpret_cast<Bits*>(p);
  Bits found = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &found, __builtin_bit_cast(Bits, operation(__builtin_bit_cast(T, found))),
                                      false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  after_atomic(p);
  return __builtin_bit_cast(T, found);
}

}  // namespace simt

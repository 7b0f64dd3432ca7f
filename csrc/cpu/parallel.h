// How the CPU kernels borrow threads: the caller owns the pool (torch's own behind the ops).
#pragma once

#include <cstdint>
#include <type_traits>

namespace skvq::cpu {

struct Parallel {
  using Body = void (*)(void* closure, std::int64_t index);
  // Calls body(closure, i) once for every i in [0, count), in any order; returns when all are done.
  void (*run)(std::int64_t count, void* closure, Body body);
};

inline void run_serial(std::int64_t count, void* closure, Parallel::Body body) {
  for (std::int64_t i = 0; i < count; ++i) body(closure, i);
}
inline constexpr Parallel kSerial{run_serial};

// Waking threads takes longer than this many nanoseconds of work.
inline constexpr std::int64_t kShortWork = 20000;

// `nanoseconds`: what one call of f takes, roughly.
template <class F>
void for_each(const Parallel& parallel, std::int64_t count, std::int64_t nanoseconds, F&& f) {
  const bool alone = count <= 1 || count * nanoseconds < kShortWork;
  (alone ? kSerial : parallel).run(count, &f, [](void* closure, std::int64_t i) {
    (*static_cast<std::remove_reference_t<F>*>(closure))(i);
  });
}

}  // namespace skvq::cpu

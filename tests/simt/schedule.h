// Who runs next.
#pragma once

#include "simt/machine.h"

namespace simt {

// simt/bulk.h. Lets copies arrive that somebody waits for; false where there are none.
bool deliver_late_copies(Block& b);

SIMT_RUNTIME inline unsigned highest_bit(unsigned mask) {
  return 31u - static_cast<unsigned>(__builtin_clz(mask));
}
SIMT_RUNTIME inline unsigned random_bit(unsigned mask) {
  for (unsigned skip = machine.random.below(count_bits(mask)); skip > 0; --skip) mask &= mask - 1;
  return lowest_bit(mask);
}
SIMT_RUNTIME inline bool chance_decides() {
  return machine.config.order == Order::kRandom || machine.config.order == Order::kWarpGreedy;
}

SIMT_RUNTIME inline void make_ready(Block& b, Warp& w, unsigned lanes) {
  if (lanes == 0) return;
  w.ready |= lanes;
  b.ready_warps |= 1u << w.index;
}

SIMT_RUNTIME inline Fiber* pick(Block& b) {
  if (b.ready_warps == 0) return nullptr;
  unsigned warp = 0, lane = 0;
  switch (machine.config.order) {
    case Order::kInOrder:
      warp = lowest_bit(b.ready_warps);
      lane = lowest_bit(b.warps[warp].ready);
      break;
    case Order::kReverse:
      warp = highest_bit(b.ready_warps);
      lane = highest_bit(b.warps[warp].ready);
      break;
    case Order::kWarpGreedy:
    case Order::kRandom:
      warp = machine.config.order == Order::kWarpGreedy && b.last_warp != nullptr && b.last_warp->ready != 0
                 ? b.last_warp->index
                 : random_bit(b.ready_warps);
      lane = random_bit(b.warps[warp].ready);
      break;
  }
  Warp& w = b.warps[warp];
  b.last_warp = &w;
  w.ready &= ~(1u << lane);
  if (w.ready == 0) b.ready_warps &= ~(1u << warp);
  return &b.fibers[warp * kLanes + lane];
}

// Leaves the current thread for one that can go on, or for the host where there is none.
__attribute__((noinline)) SIMT_RUNTIME inline void reschedule(Fiber& f, bool done) {
  Block& b = *f.block;
  Fiber* next = b.live == 0 ? nullptr : pick(b);
  while (next == nullptr && b.live != 0 && deliver_late_copies(b)) next = pick(b);
  if (next == &f) return;
  void* dropped;
  void** save = done ? &dropped : &f.stack_pointer;
  void** fake_stack = done ? nullptr : &f.fake_stack;
  if (next != nullptr) {
    switch_to_fiber(save, fake_stack, *next);
  } else {
    switch_to_host(save, fake_stack);
  }
  enter_stack(f.fake_stack, nullptr);
}

SIMT_RUNTIME inline void wait(Fiber& f, const char* what, const Location& here, unsigned mask) {
  f.wait = {what, here, mask};
  reschedule(f, false);
  f.wait.what = nullptr;
}

// Where chance decides, others may go first.
SIMT_RUNTIME inline void let_others(Fiber& f) {
  if (!chance_decides() || !machine.random.coin()) return;
  make_ready(*f.block, *f.warp, 1u << f.lane);
  reschedule(f, false);
}

}  // namespace simt

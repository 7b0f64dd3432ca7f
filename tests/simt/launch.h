// Running a grid: block after block, each thread on a stack of its own.
#pragma once

#include <sys/mman.h>

#include <numeric>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "simt/bulk.h"
#include "simt/collectives.h"

namespace simt {

// Blocks that run one after the other must not be the same threads to ThreadSanitizer, or it would take what they
// do for ordered. So sets of fibers take turns.
inline constexpr unsigned kSets = SIMT_TSAN ? 3 : 1;
inline Block* sets[kSets] = {};

// ---- the life of a thread ----

SIMT_RUNTIME inline void check_return(const Fiber& f) {
  const Block& b = *f.block;
  const Warp& w = *f.warp;
  if (f.num_copies != 0) {
    fail("the thread returns and has never waited for the cp.async at %s:%u", SIMT_AT(f.copies[0].here));
  }
  for (unsigned i = 0; i < w.num_open; ++i) {
    const Rendezvous& r = w.open[i];
    if ((r.mask >> f.lane & 1) != 0) {
      fail("the thread returns while lanes %08x wait for it in %s at %s:%u", r.arrived, r.what, SIMT_AT(r.here));
    }
  }
  if (b.barrier.arrived != 0) {
    fail("the thread returns while %u threads wait in __syncthreads at %s:%u", b.barrier.arrived,
         SIMT_AT(b.barrier.here));
  }
  if (b.live == 1 && b.num_bulk != 0) {
    fail("the block ends and nobody has waited for the cp.async.bulk at %s:%u", SIMT_AT(b.bulk[0].here));
  }
}

SIMT_RUNTIME inline void fiber_main() {
  Fiber& f = *current;
  enter_stack(nullptr, machine.stack.low == nullptr ? &machine.stack : nullptr);
  acquire(&machine.begin);
  machine.invoke(machine.call);
  check_return(f);
  release(&machine.end);
  f.warp->live &= ~(1u << f.lane);
  --f.block->live;
  reschedule(f, true);
  __builtin_unreachable();
}

// ---- fibers and their stacks, kept from launch to launch ----

SIMT_RUNTIME inline void grow(Block& b, unsigned num_threads, std::size_t stack_bytes) {
  if (b.num_fibers >= num_threads) return;
  WithoutHistory quiet;  // or threads that read threadIdx would race with the allocation
  // An odd number of pages, so that stacks do not share cache sets; the first page catches overflows.
  const std::size_t page = 4096, stride = stack_bytes + page;
  const unsigned count = (num_threads + 127) / 128 * 128;
  Fiber* fibers = static_cast<Fiber*>(std::realloc(b.fibers, count * sizeof(Fiber)));
  void* memory = mmap(nullptr, stride * (count - b.num_fibers), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fibers == nullptr || memory == MAP_FAILED) throw Error("the host has no memory for the stacks of a block");
  unsigned char* base = static_cast<unsigned char*>(memory);
  for (unsigned i = b.num_fibers; i < count; ++i, base += stride) {
    mprotect(base, page, PROT_NONE);
    fibers[i] = Fiber{};
    fibers[i].stack = {base + page, stack_bytes};
  }
  b.fibers = fibers;
  b.num_fibers = count;
}

SIMT_RUNTIME inline Block& next_block(unsigned turn, unsigned num_threads) {
  Block*& b = sets[turn % kSets];
  if (b == nullptr) {
    WithoutHistory quiet;
    b = static_cast<Block*>(std::calloc(1, sizeof(Block)));
    if (b == nullptr) throw Error("the host has no memory for a block");
  }
  grow(*b, num_threads, machine.config.stack_bytes);
  return *b;
}

SIMT_RUNTIME inline void start_thread(Block& b, unsigned t) {
  Fiber& f = b.fibers[t];
  const dim3& n = b.threads;
  f.index = {t % n.x, t / n.x % n.y, t / n.x / n.y};
  f.block = &b;
  f.warp = &b.warps[t / kLanes];
  f.lane = t % kLanes;
  f.wait.what = nullptr;
  f.num_copies = f.num_groups = f.num_observed = 0;
  f.fence = Fence::kNone;
  f.fake_stack = nullptr;
  unpoison(f.stack.low, f.stack.bytes);
  char name[64] = "";
  if (SIMT_TSAN) {
    std::snprintf(name, sizeof name, "block (%u, %u, %u) thread %u", b.index.x, b.index.y, b.index.z, t);
  }
  make_thread(&f.thread, name);
  // Staggered tops: the hot ends of the stacks would share cache sets too.
  unsigned char* low = static_cast<unsigned char*>(const_cast<void*>(f.stack.low));
  f.stack_pointer = new_stack(low + f.stack.bytes - t % 16 * 192, fiber_main);
}

SIMT_RUNTIME inline void start_block(Block& b, std::uint64_t index, dim3 blocks, dim3 threads,
                                     std::size_t dynamic_bytes) {
  b.blocks = blocks;
  b.threads = threads;
  b.index = {static_cast<unsigned>(index % blocks.x), static_cast<unsigned>(index / blocks.x % blocks.y),
             static_cast<unsigned>(index / blocks.x / blocks.y)};
  b.num_threads = b.live = threads.x * threads.y * threads.z;
  b.num_warps = (b.num_threads + kLanes - 1) / kLanes;
  b.ready_warps = b.num_barriers = b.num_bulk = b.num_shared = 0;
  b.last_warp = nullptr;
  fill_bytes(&b.barrier, sizeof b.barrier, 0);
  b.dynamic = {nullptr, dynamic_bytes == 0 ? nullptr : allocate_shared(dynamic_bytes, 128), dynamic_bytes};
  for (unsigned i = 0; i < b.num_warps; ++i) {
    Warp& w = b.warps[i];
    const unsigned lanes = b.num_threads - i * kLanes;
    w.index = i;
    w.lanes = w.live = lanes >= kLanes ? ~0u : (1u << lanes) - 1;
    w.ready = w.num_open = 0;
    w.phase = 0;
    make_thread(&w.bulk_thread, "bulk copies");
    make_ready(b, w, w.lanes);
  }
  for (unsigned t = 0; t < b.num_threads; ++t) start_thread(b, t);
}

// ---- reports ----

inline void append(std::string& text, const char* format, ...) __attribute__((format(printf, 2, 3)));
inline void append(std::string& text, const char* format, ...) {
  char line[512];
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  text += line;
}

inline void report_warp(std::string& text, const Block& b, const Warp& w) {
  for (unsigned left = w.live; left != 0;) {
    const Wait& first = b.fibers[w.index * kLanes + lowest_bit(left)].wait;
    unsigned alike = 0;
    for (unsigned todo = left; todo != 0; todo &= todo - 1) {
      const Wait& other = b.fibers[w.index * kLanes + lowest_bit(todo)].wait;
      if (other.what == first.what && same(other.here, first.here)) alike |= 1u << lowest_bit(todo);
    }
    append(text, "\n  warp %u lanes %08x wait in %s at %s:%u", w.index, alike, first.what, SIMT_AT(first.here));
    if (first.mask != 0) append(text, " for lanes %08x", first.mask);
    left &= ~alike;
  }
}

inline std::string deadlock_report(const Block& b) {
  std::string text;
  append(text, "deadlock: none of the %u threads of block (%u, %u, %u) that are left can go on", b.live, b.index.x,
         b.index.y, b.index.z);
  for (unsigned w = 0; w < b.num_warps; ++w) report_warp(text, b, b.warps[w]);
  for (unsigned i = 0; i < b.num_barriers; ++i) {
    const PhaseBarrier& m = b.barriers[i];
    append(text, "\n  mbarrier %u: phase %llu, %u of %u arrivals missing, %lld bytes missing", i,
           static_cast<unsigned long long>(m.phase), m.pending, m.expected, static_cast<long long>(m.bytes));
  }
  for (unsigned i = 0; i < b.num_bulk; ++i) {
    append(text, "\n  cp.async.bulk of %u bytes at %s:%u is under way", b.bulk[i].bytes, SIMT_AT(b.bulk[i].here));
  }
  return text;
}

// ---- the grid ----

// The dropped threads of a block that failed end here, and what they did comes before what the host does next.
SIMT_RUNTIME inline void drop_threads(Block& b) {
  if (!SIMT_TSAN) return;
  for (unsigned t = 0; t < b.num_threads; ++t) {
    become_thread(b.fibers[t].thread);
    release(&machine.end);
  }
  for (unsigned w = 0; w < b.num_warps; ++w) {
    become_thread(b.warps[w].bulk_thread);
    release(&machine.end);
  }
  become_thread(machine.thread);
  for (unsigned t = 0; t < b.num_threads; ++t) drop_thread(&b.fibers[t].thread);
  for (unsigned w = 0; w < b.num_warps; ++w) drop_thread(&b.warps[w].bulk_thread);
}

SIMT_RUNTIME inline std::string run_block(Block& b) {
  machine.block = &b;
  if (Fiber* first = pick(b)) {
    switch_to_fiber(&machine.stack_pointer, &machine.fake_stack, *first);
    enter_stack(machine.fake_stack, nullptr);
  }
  std::string error;
  if (machine.failed) {
    acquire(&machine.end);
    error = machine.error;
  } else if (b.live != 0) {
    error = deadlock_report(b);
  }
  if (!error.empty()) drop_threads(b);
  free_shared(b);
  machine.block = nullptr;
  return error;
}

inline std::vector<std::uint64_t> block_order(std::uint64_t count) {
  std::vector<std::uint64_t> order(count);
  std::iota(order.begin(), order.end(), std::uint64_t{0});
  if (machine.config.order == Order::kReverse) {
    for (std::uint64_t i = 0; i < count; ++i) order[i] = count - 1 - i;
  } else if (chance_decides()) {
    for (std::uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[machine.random.below(unsigned(i))]);
  }
  return order;
}

inline void check_launch(dim3 blocks, dim3 threads, std::size_t dynamic_bytes) {
  if (machine.block != nullptr) throw Error("a kernel is launched while another runs: the emulator has one machine");
  const std::uint64_t count = std::uint64_t{threads.x} * threads.y * threads.z;
  std::string shape;
  append(shape, "%u x %u x %u blocks of %u x %u x %u threads with %zu bytes of shared memory", blocks.x, blocks.y,
         blocks.z, threads.x, threads.y, threads.z, dynamic_bytes);
  if (count == 0 || count > kLanes * kMaxWarps || blocks.x == 0 || blocks.x > 0x7fffffffu || blocks.y == 0 ||
      blocks.y > 65535 || blocks.z == 0 || blocks.z > 65535 || dynamic_bytes > kMaxSharedBytes) {
    throw Error("no GPU launches " + shape);
  }
}

inline void run_grid(dim3 blocks, dim3 threads, std::size_t dynamic_bytes, void (*invoke)(const void*),
                     const void* call) {
  check_launch(blocks, threads, dynamic_bytes);
  machine.config = config();
  machine.random = Random(machine.config.seed);
  machine.thread = this_thread();
  machine.stack = {};
  machine.invoke = invoke;
  machine.call = call;
  machine.failed = false;
  release(&machine.begin);
  std::string error;
  unsigned turn = 0;
  for (const std::uint64_t index : block_order(std::uint64_t{blocks.x} * blocks.y * blocks.z)) {
    Block& b = next_block(turn++, threads.x * threads.y * threads.z);
    start_block(b, index, blocks, threads, dynamic_bytes);
    error = run_block(b);
    if (!error.empty()) break;
  }
  acquire(&machine.end);
  if (!error.empty()) throw Error(error);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, std::size_t dynamic_bytes,
            const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "CUDA passes at most 4 KiB of parameters");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;
  };
  const Call call{kernel, {arguments...}};
  run_grid(
      blocks, threads, dynamic_bytes,
      [](const void* p) {
        const Call& c = *static_cast<const Call*>(p);
        std::apply(c.kernel, c.parameters);
      },
      &call);
}

}  // namespace simt

// cp.async and bulk copies that are used as they should be.
#include "simt/selftest/grid.h"

namespace simt::selftest {
namespace {

namespace ptx = skvq::cuda::ptx;

struct Stage {
  uint4 words[32];
};
struct Ring {
  Stage stages[3];
};

// Thread t copies 4 t bytes for t < 4, 16 otherwise; what is not copied is zero.
__global__ void partial_copies(int* out, const int* in) {
  SKVQ_SHARED(Stage, stage);
  const int bytes = threadIdx.x < 4 ? static_cast<int>(threadIdx.x) * 4 : 16;
  ptx::copy_async_16(&stage.words[threadIdx.x], bytes == 0 ? nullptr : in + threadIdx.x * 4, bytes);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  const uint4 w = stage.words[threadIdx.x];
  out[threadIdx.x] = static_cast<int>(w.x + 10 * w.y + 100 * w.z + 1000 * w.w);
}

// Groups finish in the order in which they began; an empty one is a group too.
__global__ void groups(int* out, const int* in) {
  SKVQ_SHARED(Ring, ring);
  const auto begin = [&](int stage) {
    ptx::copy_async_16(&ring.stages[stage].words[threadIdx.x], in + (threadIdx.x + static_cast<unsigned>(stage)) * 4);
    ptx::commit_copies();
  };
  begin(0);
  begin(1);
  ptx::commit_copies();
  begin(2);
  ptx::wait_copies<3>();
  unsigned sum = ring.stages[0].words[threadIdx.x].x;
  ptx::wait_copies<2>();
  sum += 100 * ring.stages[1].words[threadIdx.x].x;
  ptx::wait_copies<0>();
  out[threadIdx.x] = static_cast<int>(sum + 10000 * ring.stages[2].words[threadIdx.x].x);
}

constexpr int kTiles = 7, kStages = 3, kTileWords = 32;

struct BulkRing {
  alignas(128) int stages[kStages][kTileWords];
  std::uint64_t arrived[kStages];
};

// Each warp streams its tiles through a ring of its own, as the decode kernel does.
__global__ void streams(int* out, const int* in) {
  SKVQ_DYNAMIC_SHARED(memory);
  BulkRing& ring = reinterpret_cast<BulkRing*>(memory)[threadIdx.x / 32];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int* mine = in + global_index() / 32 * kTiles * kTileWords;
  const auto load = [&](int tile) {
    if (lane != 0 || tile >= kTiles) return;
    ptx::barrier_arrive_expect(&ring.arrived[tile % kStages], kTileWords * 4);
    for (int part = 0; part < 2; ++part) {  // two copies for one phase
      const int at = part * kTileWords / 2;
      ptx::copy_bulk(ring.stages[tile % kStages] + at, mine + tile * kTileWords + at, kTileWords * 2,
                     &ring.arrived[tile % kStages]);
    }
  };
  if (lane == 0) {
    for (std::uint64_t& barrier : ring.arrived) ptx::barrier_init(&barrier, 1);
  }
  __syncwarp();
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile);
  int sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    __syncwarp();
    load(tile + kStages - 1);
    ptx::barrier_wait(&ring.arrived[tile % kStages], static_cast<std::uint32_t>(tile / kStages % 2));
    sum = sum * 3 + ring.stages[tile % kStages][lane];
  }
  out[global_index()] = sum;
}

// Several arrivals for a phase, no copies.
__global__ void hand_over(int* out) {
  SKVQ_SHARED(BulkRing, ring);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) ptx::barrier_init(&ring.arrived[0], 32);
  __syncthreads();
  for (std::uint32_t round = 0; round < 4; ++round) {
    if (thread < 32) {
      ring.stages[0][thread] = thread * static_cast<int>(round + 1);
      ptx::barrier_arrive_expect(&ring.arrived[0], 0);
    }
    ptx::barrier_wait(&ring.arrived[0], round % 2);
    out[global_index()] += ring.stages[0][31 - thread % 32];
    __syncthreads();
  }
}

std::vector<int> numbers(int count) {
  std::vector<int> x(count);
  for (int i = 0; i < count; ++i) x[i] = i % 10;
  return x;
}

template <class Check>
void in_all_ways(Check check) {
  for (const Order order : {Order::kInOrder, Order::kReverse, Order::kRandom, Order::kWarpGreedy}) {
    for (const Async async : {Async::kLate, Async::kEarly, Async::kRandom}) {
      const Configured configured(order, async, 7);
      CAPTURE(kOrderNames[static_cast<int>(order)]);
      CAPTURE(kAsyncNames[static_cast<int>(async)]);
      check();
    }
  }
}

}  // namespace

TEST_SUITE_BEGIN("copies");

TEST_CASE("bytes that are not copied are zero") {
  const std::vector<int> in = numbers(128);
  in_all_ways([&] {
    std::vector<int> out(32);
    launch(partial_copies, 1, 32, 0, out.data(), in.data());
    for (int t = 0; t < 32; ++t) {
      int expected = 0;
      for (int w = 3; w >= 0; --w) expected = expected * 10 + (t >= 4 || w < t ? in[t * 4 + w] : 0);
      REQUIRE(out[t] == expected);
    }
  });
}

TEST_CASE("groups are waited for one by one") {
  const std::vector<int> in = numbers(4 * 34);
  in_all_ways([&] {
    std::vector<int> out(32);
    launch(groups, 1, 32, 0, out.data(), in.data());
    for (int t = 0; t < 32; ++t) {
      REQUIRE(out[t] == in[t * 4] + 100 * in[(t + 1) * 4] + 10000 * in[(t + 2) * 4]);
    }
  });
}

TEST_CASE("warps stream through rings of bulk copies") {
  const int warps = 3 * 2;
  const std::vector<int> in = numbers(warps * kTiles * kTileWords);
  in_all_ways([&] {
    std::vector<int> out(warps * 32);
    launch(streams, 3, 64, 2 * sizeof(BulkRing), out.data(), in.data());
    for (int i = 0; i < warps * 32; ++i) {
      int sum = 0;
      for (int tile = 0; tile < kTiles; ++tile) sum = sum * 3 + in[(i / 32 * kTiles + tile) * kTileWords + i % 32];
      REQUIRE(out[i] == sum);
    }
  });
}

TEST_CASE("phases of an mbarrier that threads arrive at") {
  in_all_ways([&] {
    const std::vector<int> out = results(hand_over, 3, 64);
    for (int i = 0; i < 192; ++i) REQUIRE(out[i] == (31 - i % 32) * 10);
  });
}

TEST_SUITE_END();

}  // namespace simt::selftest

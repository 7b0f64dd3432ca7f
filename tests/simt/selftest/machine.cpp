// Launches, shared memory, schedules and their configuration, arithmetic.
#include <cstdlib>

#include "simt/selftest/grid.h"

namespace simt::selftest {
namespace {

__global__ void coordinates(int* out) {
  const dim3 n = blockDim, m = gridDim;
  const unsigned thread = (threadIdx.z * n.y + threadIdx.y) * n.x + threadIdx.x;
  const unsigned block = (blockIdx.z * m.y + blockIdx.y) * m.x + blockIdx.x;
  out[block * n.x * n.y * n.z + thread] += static_cast<int>(1000 * block + thread);
}

struct Fresh {
  int words[32];
};
__global__ void fresh_memory(int* out) {
  SKVQ_DYNAMIC_SHARED(dynamic);
  SKVQ_SHARED(Fresh, one);
  SKVQ_SHARED(Fresh, two);
  const bool aligned = is_aligned(dynamic, 128) && is_aligned(&one, 16);
  const bool fresh = one.words[threadIdx.x] == -1 && two.words[threadIdx.x] == -1 && dynamic[threadIdx.x] == 0xff;
  __syncthreads();
  one.words[threadIdx.x] = two.words[threadIdx.x] = dynamic[threadIdx.x] = 3;
  out[blockIdx.x * 32 + threadIdx.x] = aligned && fresh && &one != &two;
}

// out[i] = the place in which thread i came to the counter.
__global__ void order_of_arrival(int* out, int* count) {
  out[global_index()] = atomicAdd(count, 1);
  __syncthreads();
}
std::vector<int> arrivals(Order order, std::uint64_t seed) {
  const Configured configured(order, Async::kLate, seed);
  int count = 0;
  return results(order_of_arrival, 4, 64, &count);
}

__global__ void never_ends(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[0] = 1;
}
__global__ void nothing(int*) {}

// As std::getenv sees it while the object lives.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Environment() { unsetenv(name_); }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
};

}  // namespace

TEST_SUITE_BEGIN("machine");

TEST_CASE("grids of three dimensions") {
  std::vector<int> out(24 * 60);
  launch(coordinates, dim3(2, 3, 4), dim3(5, 4, 3), 0, out.data());
  for (int i = 0; i < 24 * 60; ++i) REQUIRE(out[i] == 1000 * (i / 60) + i % 60);
}

TEST_CASE("every block finds fresh shared memory") {
  std::vector<int> out(3 * 32);
  launch(fresh_memory, 3, 32, 40, out.data());
  for (const int good : out) REQUIRE(good == 1);
}

TEST_CASE("orders of threads and blocks") {
  const std::vector<int> in_order = arrivals(Order::kInOrder, 1), reverse = arrivals(Order::kReverse, 1);
  for (int i = 0; i < 256; ++i) {
    REQUIRE(in_order[i] == i);
    REQUIRE(reverse[i] == 255 - i);
  }
  for (const Order order : {Order::kRandom, Order::kWarpGreedy}) {
    CHECK(arrivals(order, 1) == arrivals(order, 1));
    CHECK(arrivals(order, 1) != arrivals(order, 2));
    CHECK(arrivals(order, 1) != in_order);
  }
}

TEST_CASE("launches that no GPU would do") {
  int out = 0;
  CHECK_THROWS_WITH_AS(launch(nothing, 0, 32, 0, &out),
                       "no GPU launches 0 x 1 x 1 blocks of 32 x 1 x 1 threads with 0 bytes of shared memory", Error);
  CHECK_THROWS_AS(launch(nothing, 1, 1025, 0, &out), Error);
  CHECK_THROWS_AS(launch(nothing, 1, dim3(32, 33), 0, &out), Error);
  CHECK_THROWS_AS(launch(nothing, dim3(1, 65536), 32, 0, &out), Error);
  CHECK_THROWS_AS(launch(nothing, 1, 32, kMaxSharedBytes + 1, &out), Error);
}

TEST_CASE("after a kernel that failed others run") {
  int out = 0;
  for (int i = 0; i < 3; ++i) {
    CHECK_THROWS_AS(launch(never_ends, 2, 64, 16, &out), Error);
    CHECK(results(coordinates, 2, 64)[127] == 1063);
  }
}

TEST_CASE("the environment chooses order, copies and seed") {
  const Environment order("SKVQ_SIMT_ORDER", "warp-greedy"), async("SKVQ_SIMT_ASYNC", "early");
  const Environment seed("SKVQ_SIMT_SEED", "12");
  const Config c = config_from_environment();
  CHECK(c.order == Order::kWarpGreedy);
  CHECK(c.async == Async::kEarly);
  CHECK(c.seed == 12);
}

TEST_CASE("a choice that there is not is refused") {
  {
    const Environment order("SKVQ_SIMT_ORDER", "sideways");
    CHECK_THROWS_WITH_AS(config_from_environment(),
                         "SKVQ_SIMT_ORDER: expected one of in-order, reverse, random, warp-greedy; found \"sideways\"",
                         Error);
  }
  const Environment seed("SKVQ_SIMT_SEED", "1x");
  CHECK_THROWS_WITH_AS(config_from_environment(), "SKVQ_SIMT_SEED: expected a number, found \"1x\"", Error);
}

TEST_CASE("integer intrinsics") {
  CHECK(__popc(0xf0f0u) == 8);
  CHECK(__clz(1) == 31);
  CHECK(__clz(0) == 32);
  CHECK(__ffs(0) == 0);
  CHECK(__ffs(8) == 4);
  CHECK(__umulhi(0xffffffffu, 2u) == 1u);
  CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x7250u) == 0x77225500u);
  CHECK(__byte_perm(0x80u, 0u, 0x8888u) == 0xffffffffu);
  CHECK(__funnelshift_l(0x80000000u, 1u, 1u) == 3u);
  CHECK(__funnelshift_r(0x80000000u, 1u, 31u) == 3u);
  CHECK(__dp4a(0x01ff02fe, 0x7f010203, 100) == 100 + 127 - 1 + 4 - 6);
  CHECK(__float2int_rn(2.5f) == 2);
  CHECK(__float2int_rn(-3e9f) == -0x7fffffff - 1);
}

TEST_SUITE_END();

}  // namespace simt::selftest

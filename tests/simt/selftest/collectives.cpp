// Collectives of a warp, votes of a block, atomics.
#include "simt/selftest/grid.h"

namespace simt::selftest {
namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void shuffles(int4* out, int width) {
  const int value = global_index(), lane = static_cast<int>(threadIdx.x % 32);
  const int one = __shfl_sync(kAll, value, lane * 5 + 3, width), up = __shfl_up_sync(kAll, value, 3, width);
  const int down = __shfl_down_sync(kAll, value, 5, width), mixed = __shfl_xor_sync(kAll, value, 6, width);
  out[value] = make_int4(one, up, down, mixed);
}

// What a thread reads from lane `from`: its own value where that lies outside of its segment of `width` lanes.
int shuffled(int index, int from, int width) {
  const int lane = index % 32, first = lane / width * width;
  return from >= first && from < first + width ? index - lane + from : index;
}

__global__ void votes(unsigned* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned odd = __ballot_sync(kAll, lane % 2);
  const unsigned some = static_cast<unsigned>(__any_sync(kAll, lane == 7)) | __any_sync(kAll, 0) << 1;
  const unsigned all = static_cast<unsigned>(__all_sync(kAll, lane < 32)) | __all_sync(kAll, lane < 31) << 1;
  out[global_index()] = odd ^ (some << 8 | all << 16);
}

__global__ void reductions(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32), value = lane - 10;
  const unsigned low = 0x0000ffffu, mask = lane < 16 ? low : ~low;
  int digest = 0;
  if (lane < 16) {
    digest = __reduce_add_sync(mask, value) + 100 * __reduce_min_sync(mask, value);
  } else {
    digest = __reduce_max_sync(mask, value) + 100 * static_cast<int>(__reduce_xor_sync(mask, unsigned(lane)));
  }
  digest += 10000 * static_cast<int>(__reduce_and_sync(kAll, unsigned(lane) | 4u));
  out[global_index()] = digest + 100000 * static_cast<int>(__reduce_or_sync(kAll, unsigned(lane) & 9u));
}

__global__ void block_votes(int* out) {
  const int thread = static_cast<int>(threadIdx.x);
  int digest = __syncthreads_count(thread % 3 == 0);
  digest = digest * 2 + __syncthreads_or(thread == 40);
  digest = digest * 2 + __syncthreads_or(0);
  digest = digest * 2 + __syncthreads_and(thread < 64);
  out[global_index()] = digest * 2 + __syncthreads_and(thread < 63);
}

struct Counters {
  int sum, low, high;
  unsigned bits, wrapped;
  float real;
  int product;
};
__global__ void atomics(Counters* c) {
  const int thread = static_cast<int>(threadIdx.x);
  atomicAdd(&c->sum, thread);
  atomicMin(&c->low, thread - 50);
  atomicMax(&c->high, thread * 2);
  atomicOr(&c->bits, 1u << thread % 32);
  atomicInc(&c->wrapped, 9u);
  atomicAdd(&c->real, 0.5f);
  for (int seen = 0, found = -1; seen != found;) {
    seen = atomicAdd(&c->product, 0);
    found = atomicCAS(&c->product, seen, seen * 3 % 101);
  }
}

}  // namespace

TEST_SUITE_BEGIN("collectives");

TEST_CASE("shuffles read the lanes that the PTX ISA says") {
  for (const int width : {32, 16, 8, 4, 1}) {
    const std::vector<int4> out = results(shuffles, 2, 64, width);
    for (int i = 0; i < 128; ++i) {
      const int lane = i % 32, first = lane / width * width;
      REQUIRE(out[i].x == shuffled(i, first + (lane * 5 + 3) % width, width));
      REQUIRE(out[i].y == shuffled(i, lane - 3, width));
      REQUIRE(out[i].z == shuffled(i, lane + 5, width));
      REQUIRE(out[i].w == shuffled(i, lane ^ 6, width));
    }
  }
}

TEST_CASE("ballot, any and all") {
  for (const unsigned found : results(votes, 1, 64)) REQUIRE(found == (0xaaaaaaaau ^ (1u << 8 | 1u << 16)));
}

TEST_CASE("reductions over parts of a warp") {
  const std::vector<int> out = results(reductions, 1, 32);
  for (int lane = 0; lane < 32; ++lane) {
    // lanes 0 to 15 hold -10 to 5; 16 to 31 hold 6 to 21
    const int part = lane < 16 ? -40 + 100 * -10 : 21 + 100 * 0;
    REQUIRE(out[lane] == part + 10000 * 4 + 100000 * 9);
  }
}

TEST_CASE("votes of a block") {
  for (const int found : results(block_votes, 2, 64)) REQUIRE(found == ((22 * 2 + 1) * 2 * 2 + 1) * 2);
}

TEST_CASE("atomics") {
  Counters c{};
  c.product = 1;
  launch(atomics, 1, 64, 0, &c);
  CHECK(c.sum == 64 * 63 / 2);
  CHECK(c.low == -50);
  CHECK(c.high == 126);
  CHECK(c.bits == kAll);
  CHECK(c.wrapped == 64 % 10);
  CHECK(c.real == 32.0f);
  int product = 1;
  for (int i = 0; i < 64; ++i) product = product * 3 % 101;
  CHECK(c.product == product);
}

TEST_SUITE_END();

}  // namespace simt::selftest

// The caches that are measured: several of one shape in device memory, taken in turn, so that no call finds its data in
// the L2, as in a model whose layers come in turn.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "case.h"
#include "cuda/cuda.h"
#include "gpu/random.h"

namespace skvq::bench {

// Where the parts of one cache lie in its piece of memory.
struct CacheLayout {
  std::size_t pages, sinks, ring, rows;  // bytes of: all pages; sinks, ring, new rows of K or V
  int max_pages;

  explicit CacheLayout(const Case& c) {
    max_pages = packed_tiles(std::max(c.context, c.append_tokens) + kTileTokens, c.sinks, c.window) + 1;
    pages = aligned(static_cast<std::size_t>(c.batch) * max_pages * c.page_bytes());
    sinks = aligned(static_cast<std::size_t>(c.batch) * c.sinks * c.row_bytes());
    ring = aligned(static_cast<std::size_t>(c.batch) * ring_slots(c.window, c.rollback) * c.row_bytes());
    rows = aligned(c.op == "decode" ? 0 : static_cast<std::size_t>(c.batch) * c.append_tokens * c.row_bytes());
  }
  std::size_t total() const { return pages + 2 * (sinks + ring + rows); }
  std::size_t without_rows() const { return pages + 2 * (sinks + ring); }

 private:
  static std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }
};

class Caches {
 public:
  Caches(const Case& c, int count, cudaStream_t stream)
      : case_(c), layout_(c), count_(count), stream_(stream), memory_(layout_.total() * count) {
    std::vector<std::int32_t> table(static_cast<std::size_t>(c.batch) * layout_.max_pages);
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(1));  // pages come in the order in which they were free
    page_table_ = DeviceBytes(table);
    exponents_ = DeviceBytes(std::vector<std::int32_t>(c.heads * 4, -2));
    clip_ = DeviceBytes(std::vector<float>(static_cast<std::size_t>(c.heads) * kMaxGroups, 1.0f));
    kv_len_ = DeviceBytes(std::vector<std::int32_t>(static_cast<std::size_t>(count) * c.batch, 0));
    start_ = DeviceBytes(kv_len_.size());
    const std::int64_t row = static_cast<std::int64_t>(c.heads) * c.head_dim;
    for (int i = 0; i < count && layout_.rows > 0; ++i) {
      for (const Side side : kSides) {
        fill_normal(c.dtype, rows(i, side), static_cast<std::int64_t>(c.batch) * c.append_tokens * row,
                    2 * i + (side == Side::kKey ? 0 : 1), stream);
      }
    }
  }
  int count() const { return count_; }
  std::size_t bytes() const { return memory_.size(); }

  // What `reset` sets all lengths to.
  void start_at(int kv_len) {
    start_.upload(std::vector<std::int32_t>(static_cast<std::size_t>(count_) * case_.batch, kv_len));
  }
  void reset() const {
    cuda_check(cudaMemcpyAsync(kv_len_.bytes(), start_.bytes(), start_.size(), cudaMemcpyDeviceToDevice, stream_),
               "setting lengths");
  }

  CacheView view(int i) const {
    std::uint8_t* base = memory_.bytes() + layout_.total() * i;
    CacheView v{};
    v.pages = base;
    v.sink_k = base + layout_.pages;
    v.sink_v = base + layout_.pages + layout_.sinks;
    v.ring_k = base + layout_.pages + 2 * layout_.sinks;
    v.ring_v = base + layout_.pages + 2 * layout_.sinks + layout_.ring;
    v.page_table = page_table_.as<std::int32_t>();
    v.kv_len = kv_len_.as<std::int32_t>() + static_cast<std::int64_t>(i) * case_.batch;
    v.exponents = exponents_.as<std::int32_t>();
    v.num_pages = static_cast<std::int64_t>(case_.batch) * layout_.max_pages;
    v.batch = case_.batch;
    v.num_kv_heads = case_.heads;
    v.head_dim = case_.head_dim;
    v.max_pages = layout_.max_pages;
    v.num_sinks = case_.sinks;
    v.ring_slots = ring_slots(case_.window, case_.rollback);
    v.window = case_.window;
    v.dtype = case_.dtype;
    v.format = case_.format;
    return v;
  }
  AppendArgs append_args(int i) const {
    return append_args(i, rows(i, Side::kKey), rows(i, Side::kValue), case_.append_tokens);
  }

  // Appends random tokens to the first cache, as a model would, and copies it to the others.
  void fill(int kv_len) {
    const int chunk = std::max(1, std::min(kv_len, 16384 / case_.batch));
    const std::int64_t row = static_cast<std::int64_t>(case_.heads) * case_.head_dim;
    const DeviceBytes k(static_cast<std::size_t>(case_.batch) * chunk * case_.row_bytes()), v(k.size());
    start_at(0);
    reset();
    for (int done = 0; done < kv_len; done += chunk) {
      fill_normal(case_.dtype, k.bytes(), case_.batch * chunk * row, 2 * done + 1, stream_);
      fill_normal(case_.dtype, v.bytes(), case_.batch * chunk * row, 2 * done + 2, stream_);
      cuda::append(append_args(0, k.bytes(), v.bytes(), std::min(chunk, kv_len - done)), stream_);
    }
    for (int i = 1; i < count_; ++i) {
      cuda_check(cudaMemcpyAsync(memory_.bytes() + layout_.total() * i, memory_.bytes(), layout_.without_rows(),
                                 cudaMemcpyDeviceToDevice, stream_),
                 "copying a cache");
    }
    cuda_check(cudaStreamSynchronize(stream_), "filling the caches");
  }

 private:
  std::uint8_t* rows(int i, Side side) const {
    return memory_.bytes() + layout_.total() * i + layout_.without_rows() + (side == Side::kKey ? 0 : layout_.rows);
  }
  AppendArgs append_args(int i, const void* k, const void* v, int tokens) const {
    const std::int64_t row = static_cast<std::int64_t>(case_.heads) * case_.head_dim;
    return {view(i),
            {k, row, case_.head_dim},
            {v, row, case_.head_dim},
            {nullptr, static_cast<std::int64_t>(tokens) * case_.batch, case_.batch},
            {clip_.as<float>()},
            {clip_.as<float>()}};
  }

  Case case_;
  CacheLayout layout_;
  int count_;
  cudaStream_t stream_;
  DeviceBytes memory_, page_table_, exponents_, clip_, kv_len_, start_;
};

}  // namespace skvq::bench

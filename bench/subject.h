// The caches that are measured: several of one shape, taken in turn, so that no call finds its data in the cache
// of the processor, as in a model whose layers come in turn.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "case.h"
#include "core/minifloat.h"
#include "cpu/cpu.h"
#include "thread_pool.h"

namespace skvq::bench {

inline std::vector<std::uint8_t> random_rows(std::size_t elements, DType dtype) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<std::uint8_t> bytes(elements * dtype_bytes(dtype));
  for (std::size_t i = 0; i < elements; ++i)
    store_float(dtype, bytes.data(), static_cast<std::int64_t>(i), normal(generator));
  return bytes;
}

// One sequence of `context` tokens.
class Subject {
 public:
  explicit Subject(const Case& c) : max_pages_((c.context + c.append_tokens) / kTileTokens + 1) {
    CacheView& view = view_;
    view.format = c.format;
    view.num_pages = view.max_pages = max_pages_;
    view.batch = 1;
    view.num_kv_heads = c.heads;
    view.head_dim = c.head_dim;
    view.num_sinks = c.sinks;
    view.window = c.window;
    view.ring_slots = ring_slots(c.window, c.rollback);
    view.dtype = c.dtype;
    pages_.resize(static_cast<std::size_t>(max_pages_) * c.heads * c.format.record_bytes());
    for (int i = 0; i < max_pages_; ++i) page_table_.push_back(i);
    for (auto* buffer : {&sink_k_, &sink_v_})
      *buffer = random_rows(std::size_t(c.sinks) * c.heads * c.head_dim, c.dtype);
    for (auto* buffer : {&ring_k_, &ring_v_})
      *buffer = random_rows(std::size_t(view.ring_slots) * c.heads * c.head_dim, c.dtype);
    exponents_.assign(c.heads * 4, 0);
    clip_.assign(c.heads * kMaxGroups, 1.0f);
    view.pages = pages_.data();
    view.page_table = page_table_.data();
    view.sink_k = sink_k_.data();
    view.sink_v = sink_v_.data();
    view.ring_k = ring_k_.data();
    view.ring_v = ring_v_.data();
    view.kv_len = &kv_len_;
    view.exponents = exponents_.data();
  }
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

  // Packs one tile and copies it to all pages: the time of a call does not depend on the values.
  void fill(const Case& c, const std::vector<std::uint8_t>& rows) {
    kv_len_ = c.sinks + c.window;
    cpu::append(append_args(c, rows, kTileTokens), kPool);
    const std::size_t page = pages_.size() / max_pages_;
    for (int i = 1; i < max_pages_; ++i) std::copy_n(pages_.data(), page, pages_.data() + i * page);
    kv_len_ = c.context;
  }

  AppendArgs append_args(const Case& c, const std::vector<std::uint8_t>& rows, int count) const {
    const RowsView view{rows.data(), static_cast<std::int64_t>(c.heads) * c.head_dim, c.head_dim};
    return {view_, view, view, {nullptr, count, 1}, {clip_.data()}, {clip_.data()}};
  }
  const CacheView& view() const { return view_; }
  void set_length(int kv_len) { kv_len_ = kv_len; }
  std::size_t bytes() const { return pages_.size() + 2 * (sink_k_.size() + ring_k_.size()); }

 private:
  int max_pages_;
  CacheView view_{};
  std::int32_t kv_len_ = 0;
  std::vector<std::uint8_t> pages_, sink_k_, sink_v_, ring_k_, ring_v_;
  std::vector<std::int32_t> page_table_, exponents_;
  std::vector<float> clip_;
};

// As many caches as make up the working set, at least two.
class Subjects {
 public:
  Subjects(const Case& c, std::size_t working_set) : rows_(random_rows(rows_elements(c), c.dtype)) {
    do {
      all_.push_back(std::make_unique<Subject>(c));
      all_.back()->fill(c, rows_);
      bytes_ += all_.back()->bytes();
    } while (all_.size() < 2 || bytes_ < working_set);
  }
  Subject& operator[](int i) { return *all_[i % all_.size()]; }
  std::size_t size() const { return all_.size(); }
  std::size_t bytes() const { return bytes_; }
  const std::vector<std::uint8_t>& rows() const { return rows_; }

 private:
  static std::size_t rows_elements(const Case& c) {
    return static_cast<std::size_t>(std::max(kTileTokens, c.append_tokens)) * c.heads * c.head_dim;
  }
  std::vector<std::uint8_t> rows_;
  std::vector<std::unique_ptr<Subject>> all_;
  std::size_t bytes_ = 0;
};

}  // namespace skvq::bench

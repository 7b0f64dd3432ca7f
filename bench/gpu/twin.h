// A cache twice, on the host and on the device: the CPU backend writes one, the CUDA backend the other, and every byte
// must be the same, those that nobody should touch included.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "case.h"
#include "core/minifloat.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "gpu/findings.h"
#include "gpu/random.h"
#include "gpu/runtime.h"
#include "thread_pool.h"

namespace skvq::bench {

using Bytes = std::vector<std::uint8_t>;
inline constexpr std::uint8_t kPoison = 0xff;  // a NaN in every type of number here

struct Shape {
  Scheme scheme{"2", "1.5"};
  int group = 128, head_dim = 128;
  std::string meta = "fp8";
  DType dtype = DType::kBf16;
  int batch = 1, heads = 2, sinks = 5, window = 32, rollback = 16, max_pages = 16;

  RecordFormat format() const { return parse_record_format(scheme.k, scheme.v, group, meta, "mma", head_dim); }
  std::int64_t row() const { return static_cast<std::int64_t>(heads) * head_dim; }
  std::string text() const {
    const char* dtypes[] = {"f32", "f16", "bf16"};
    return concat("k", scheme.k, "-v", scheme.v, "-g", group, "-", meta, " d", head_dim, " ",
                  dtypes[static_cast<int>(dtype)]);
  }
};

// Normal numbers with channels of very different spread.
inline Bytes random_bytes(const Shape& s, std::int64_t rows, unsigned seed) {
  static const std::vector<float> normals = [] {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    std::vector<float> x(1 << 16);
    for (float& f : x) f = normal(generator);
    return x;
  }();
  const std::int64_t count = rows * s.head_dim;
  Bytes bytes(count * dtype_bytes(s.dtype));
  for (std::int64_t i = 0; i < count; ++i) {
    const float spread = 0.3f + 1.7f * static_cast<float>(i % s.head_dim) / static_cast<float>(s.head_dim);
    const float x = normals[mix(static_cast<std::uint64_t>(i) + (std::uint64_t{seed} << 40)) % normals.size()];
    store_float(s.dtype, bytes.data(), i, spread * x);
  }
  return bytes;
}

class Twin {
 public:
  // Without `poison` device memory stays as it was allocated, so that a tool sees reads of what nobody wrote.
  Twin(const Shape& s, bool poison) : shape_(s), poison_(poison) {
    CacheView& v = host_;
    v.format = s.format();
    v.num_pages = static_cast<std::int64_t>(s.batch) * s.max_pages + 3;
    v.batch = s.batch;
    v.num_kv_heads = s.heads;
    v.head_dim = s.head_dim;
    v.max_pages = s.max_pages;
    v.num_sinks = s.sinks;
    v.ring_slots = ring_slots(s.window, s.rollback);
    v.window = s.window;
    v.dtype = s.dtype;
    const std::int64_t row_bytes = s.row() * dtype_bytes(s.dtype);
    pages_.assign(v.num_pages * s.heads * v.format.record_bytes(), kPoison);
    sink_k_.assign(s.batch * s.sinks * row_bytes, kPoison);
    ring_k_.assign(s.batch * v.ring_slots * row_bytes, kPoison);
    sink_v_ = sink_k_;
    ring_v_ = ring_k_;
    std::vector<std::int32_t> order(v.num_pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(7));
    page_table_.assign(order.begin(), order.end() - 3);
    kv_len_.assign(s.batch, 0);
    for (int head = 0; head < s.heads; ++head) {
      for (const int e : {-3, -2, -2 - head % 2, -1}) exponents_.push_back(e);
    }
    for (const Side side : kSides) {
      auto& clip = side == Side::kKey ? k_clip_ : v_clip_;
      const int count = s.heads * v.format.side(side).num_groups() * clip_choices();
      for (int i = 0; i < count; ++i) clip.push_back(1.0f - 0.1f * static_cast<float>(i % 3));
    }
    device_ = host_;
    bind(pages_, host_.pages, device_.pages, poison);
    bind(sink_k_, host_.sink_k, device_.sink_k, poison);
    bind(sink_v_, host_.sink_v, device_.sink_v, poison);
    bind(ring_k_, host_.ring_k, device_.ring_k, poison);
    bind(ring_v_, host_.ring_v, device_.ring_v, poison);
    bind(kv_len_, host_.kv_len, device_.kv_len, true);
    bind(page_table_, host_.page_table, device_.page_table, true);
    bind(exponents_, host_.exponents, device_.exponents, true);
    bind(k_clip_, host_k_clip_, device_k_clip_, true);
    bind(v_clip_, host_v_clip_, device_v_clip_, true);
  }
  Twin(const Twin&) = delete;
  Twin& operator=(const Twin&) = delete;

  const Shape& shape() const { return shape_; }
  // Of a group: one dtype has several, so that every format meets both.
  int clip_choices() const { return shape_.dtype == DType::kF16 ? 3 : 1; }
  const CacheView& host() const { return host_; }
  const CacheView& device() const { return device_; }
  const std::vector<std::int32_t>& lengths() const { return kv_len_; }

  AppendArgs host_append(const void* k, const void* v, const Ragged& tokens) const {
    return {host_,  {k, shape_.row(), shape_.head_dim}, {v, shape_.row(), shape_.head_dim},
            tokens, {host_k_clip_, clip_choices()},     {host_v_clip_, clip_choices()}};
  }
  AppendArgs device_append(const void* k, const void* v, const Ragged& tokens) const {
    return {device_, {k, shape_.row(), shape_.head_dim}, {v, shape_.row(), shape_.head_dim},
            tokens,  {device_k_clip_, clip_choices()},   {device_v_clip_, clip_choices()}};
  }

  // The host's bytes on the device, whatever was there.
  void upload() const {
    for (const Part& part : parts_) {
      if (part.memory.size() == 0) continue;
      cuda_check(cudaMemcpy(part.memory.bytes(), part.host, part.memory.size(), cudaMemcpyHostToDevice),
                 "copying a cache to the device");
    }
  }
  // Where host and device differ; empty if nowhere. Memory without poison is not compared.
  std::string difference() const {
    if (!poison_) return "";
    const char* names[] = {"pages", "sink_k", "sink_v", "ring_k", "ring_v", "kv_len"};
    for (std::size_t i = 0; i < std::size(names); ++i) {
      const Bytes device = parts_[i].memory.download<std::uint8_t>();
      const auto [a, b] = std::mismatch(device.begin(), device.end(), parts_[i].host);
      if (a != device.end()) {
        return concat(names[i], " byte ", a - device.begin(), " is ", int{*a}, " on the device and ", int{*b},
                      " on the host");
      }
    }
    return "";
  }

 private:
  struct Part {
    const std::uint8_t* host;
    DeviceBytes memory;
  };
  template <class T, class HostPointer, class DevicePointer>
  void bind(std::vector<T>& data, HostPointer& host, DevicePointer& device, bool initialise) {
    host = data.data();
    DeviceBytes memory(data.size() * sizeof(T));
    device = memory.as<std::remove_pointer_t<DevicePointer>>();
    if (initialise && !data.empty()) memory.upload(data);
    parts_.push_back({reinterpret_cast<const std::uint8_t*>(data.data()), std::move(memory)});
  }

  Shape shape_;
  bool poison_;
  CacheView host_{}, device_{};
  Bytes pages_, sink_k_, sink_v_, ring_k_, ring_v_;
  std::vector<std::int32_t> kv_len_, page_table_, exponents_;
  std::vector<float> k_clip_, v_clip_;
  const float *host_k_clip_ = nullptr, *host_v_clip_ = nullptr, *device_k_clip_ = nullptr, *device_v_clip_ = nullptr;
  std::vector<Part> parts_;
};

// New tokens for every sequence, on both sides.
class NewTokens {
 public:
  NewTokens(const Shape& s, const std::vector<int>& counts, unsigned seed) : cu_seqlens_{0} {
    for (const int count : counts) cu_seqlens_.push_back(cu_seqlens_.back() + count);
    total_ = cu_seqlens_.back();
    batch_ = static_cast<int>(counts.size());
    k_ = random_bytes(s, total_ * s.heads, seed);
    v_ = random_bytes(s, total_ * s.heads, seed + 1);
    device_k_ = DeviceBytes(k_);
    device_v_ = DeviceBytes(v_);
    device_cu_seqlens_ = DeviceBytes(cu_seqlens_);
  }
  void append(Twin& twin, cudaStream_t stream) const {
    append_on_host(twin);
    cuda::append(twin.device_append(device_k_.bytes(), device_v_.bytes(),
                                    {device_cu_seqlens_.as<std::int32_t>(), total_, batch_}),
                 stream);
    cuda_check(cudaStreamSynchronize(stream), "append");
  }
  void append_on_host(Twin& twin) const {
    cpu::append(twin.host_append(k_.data(), v_.data(), {cu_seqlens_.data(), total_, batch_}), kPool);
  }

 private:
  std::vector<std::int32_t> cu_seqlens_;
  std::int64_t total_ = 0;
  int batch_ = 0;
  Bytes k_, v_;
  DeviceBytes device_k_, device_v_, device_cu_seqlens_;
};

}  // namespace skvq::bench

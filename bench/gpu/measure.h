// One case on the device: how many caches, which calls, what they cost.
#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "gpu/bandwidth.h"
#include "gpu/caches.h"
#include "gpu/options.h"
#include "gpu/split.h"

namespace skvq::bench {

struct GpuResult {
  Case c;
  std::string skipped;  // why nothing was measured; empty where something was
  GpuTiming time{};
  std::int64_t bytes = 0;  // that a call must read and write
  int caches = 0, calls = 0;
  std::size_t allocated = 0, workspace = 0;
  std::vector<KernelShare> kernels;

  double rate() const { return static_cast<double>(bytes) / time.device.min_s; }
};

// Length of a cache before the call.
inline int start_length(const Case& c) {
  if (c.op == "quantize") return 0;
  if (c.op == "decode") return c.context;
  // Near the context: behind a tile border for `append`, before one for `flush`.
  return c.sinks + c.window + kTileTokens * c.tiles() + (c.op == "flush" ? kTileTokens - 1 : 0);
}

inline std::int64_t bytes_of(const Case& c) {
  return c.op == "decode" ? decode_bytes(c) : append_bytes(c, start_length(c), c.append_tokens);
}

// Caches for a working set of `wanted` bytes per pass, at most as many as fit. Throws std::length_error where none
// does.
inline int cache_count(const Case& c, std::size_t wanted) {
  constexpr std::size_t kMost = 512;  // a pass over more would take long and tell nothing new
  const std::size_t each = CacheLayout(c).total(), reserve = std::size_t{1} << 30;
  const std::size_t free = free_bytes(), usable = free > reserve ? free - reserve : 0;
  if (each > usable) {
    throw std::length_error(
        concat("one cache needs ", each / 1'000'000, " MB and ", usable / 1'000'000, " MB are free"));
  }
  const std::size_t bytes = static_cast<std::size_t>(bytes_of(c));
  return static_cast<int>(std::min({(wanted + bytes - 1) / bytes, usable / each, kMost}));
}

// Queries, outputs and workspace of decode_attention.
class DecodeCall {
 public:
  DecodeCall(const Case& c, const CacheView& view, cudaStream_t stream) {
    const std::int64_t tokens = static_cast<std::int64_t>(c.batch) * c.q_len, heads = c.heads * c.ratio;
    const std::int64_t count = tokens * heads * c.head_dim;
    q_ = DeviceBytes(count * dtype_bytes(c.dtype));
    out_ = DeviceBytes(q_.size());
    lse_ = DeviceBytes(tokens * heads * sizeof(float));
    fill_normal(c.dtype, q_.bytes(), count, 0x5eed, stream);
    args_.cache = view;
    args_.q = {q_.bytes(), heads * c.head_dim, c.head_dim};
    args_.queries = {nullptr, tokens, c.batch};
    args_.q_dtype = c.dtype;
    args_.num_q_heads = static_cast<int>(heads);
    args_.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    args_.queries_in_cache = true;
    args_.exact = true;
    args_.out = out_.bytes();
    args_.lse = lse_.as<float>();
    workspace_ = DeviceBytes(cuda::decode_workspace_bytes(args_));
  }
  void operator()(const CacheView& view, cudaStream_t stream) {
    args_.cache = view;
    cuda::decode_attention(args_, workspace_.bytes(), stream);
  }
  std::size_t workspace_bytes() const { return workspace_.size(); }

 private:
  DecodeArgs args_{};
  DeviceBytes q_, out_, lse_, workspace_;
};

// Calls of a pass: every cache once; only decode leaves them as they were and may go round again.
inline int calls_of(const Case& c, int caches, int at_least) {
  return c.op == "decode" ? (at_least + caches - 1) / caches * caches : caches;
}

inline void measure_case(const GpuOptions& o, const PassTimer& timer, cudaStream_t stream, std::size_t working_set,
                         GpuResult& r) {
  const Case& c = r.c;
  r.bytes = bytes_of(c);
  r.caches = cache_count(c, working_set);
  r.calls = calls_of(c, r.caches, o.calls);
  Caches caches(c, r.caches, stream);
  r.allocated = caches.bytes();
  std::unique_ptr<DecodeCall> decode;
  if (c.op == "decode") {
    cuda::check_decode_format(c.format, c.dtype, c.dtype);
    decode = std::make_unique<DecodeCall>(c, caches.view(0), stream);
    r.workspace = decode->workspace_bytes();
  }
  if (c.op != "quantize") caches.fill(start_length(c));
  caches.start_at(start_length(c));
  const auto prepare = [&] { caches.reset(); };
  const auto call = [&](int i) {
    const int cache = i % r.caches;
    decode ? (*decode)(caches.view(cache), stream) : cuda::append(caches.append_args(cache), stream);
  };
  if (!o.graph) r.time = timer.time({o.warmup, o.repetitions, r.calls}, prepare, call);
  if (!o.graph && !o.split) return;
  prepare();
  call(0);  // what a first call does once must not be captured
  cuda_check(cudaStreamSynchronize(stream), "waiting for the first call");
  const Graph graph(stream, [&] {
    for (int i = 0; i < r.calls; ++i) call(i);
  });
  if (o.graph) {
    r.time = timer.time({o.warmup, o.repetitions, 1}, prepare, [&](int) { graph.launch(stream); });
    for (double* seconds : {&r.time.device.min_s, &r.time.device.median_s, &r.time.host_s}) *seconds /= r.calls;
  }
  if (o.split) r.kernels = split_kernels(graph, timer, stream, {o.warmup, o.repetitions, 1}, prepare, r.calls);
}

}  // namespace skvq::bench

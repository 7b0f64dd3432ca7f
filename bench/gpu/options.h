// Command line of bench_cuda: axes are comma-separated lists, and every combination of their values is measured.
#pragma once

#include <string>
#include <vector>

#include "case.h"

namespace skvq::bench {

struct GpuOptions {
  std::vector<std::string> ops = {"quantize", "append", "flush", "decode"}, dtypes = {"bf16"};
  std::vector<Scheme> schemes = {{"2", "2"}, {"2", "1.5"}};
  std::vector<int> heads = {8}, ratios = {4}, head_dims = {128}, contexts = {4096, 32768}, groups = {128},
                   batches = {1}, q_lens = {1};
  std::string meta = "fp8", json;
  bool graph = false, split = false;
  int window = 128, sinks = 5, rollback = 64, warmup = 3, repetitions = 20, calls = 16, working_set_mb = 0;
};

inline constexpr const char* kGpuUsage = R"(bench_cuda: time the operations of the packed cache on a CUDA device

operations
  quantize    append of all tokens of the context to empty caches: packing a prompt
  append      one token for every sequence; nothing is packed
  flush       one token for every sequence; each of them packs a tile (one step of 64 does)
  decode      attention of q-len queries per sequence over the whole cache

axes (comma-separated, every combination is measured)
  --op LIST                                                          [quantize,append,flush,decode]
  --scheme LIST     formats of K and V, e.g. k8-v8,k3:1/2+2-v1.5     [k2-v2,k2-v1.5]
  --group LIST      channels per group: 32, 64, 128 or 0 = head      [128]
  --head-dim LIST                                                    [128]
  --dtype LIST      f32, f16, bf16: queries, window and new tokens   [bf16]
  --batch LIST      sequences                                        [1]
  --heads LIST      KV heads                                         [8]
  --ratio LIST      query heads per KV head                          [4]
  --context LIST    cached tokens of each sequence                   [4096,32768]
  --q-len LIST      queries of each sequence (decode)                [1]

settings
  --meta fp8|fp16            type of scales and zeros                [fp8]
  --window N, --sinks N, --rollback N                                [128, 5, 64]
  --warmup N, --reps N       passes before and in the measurement    [3, 20]
  --calls N                  calls in a pass, at least               [16]
  --working-set MB           what the caches of a pass move is at least this; 0: twice the L2 and 200 MB  [0]
  --graph                    a pass is one CUDA graph: what a call costs without launches by the host
  --split                    also the time of each kernel by itself (the others of the graph switched off)
  --json FILE                also write the results as JSON, after each case

Times are of the device, one call; GB/s come from the fastest pass and the bytes that the format makes necessary.
)";

inline GpuOptions parse_gpu_options(int argc, char** argv) {
  GpuOptions o;
  Arguments arguments;
  arguments.texts("--op", o.ops)
      .value("--scheme", [&](auto, auto value) { o.schemes = parse_schemes(value); })
      .numbers("--group", o.groups)
      .numbers("--head-dim", o.head_dims)
      .texts("--dtype", o.dtypes)
      .numbers("--batch", o.batches)
      .numbers("--heads", o.heads)
      .numbers("--ratio", o.ratios)
      .numbers("--context", o.contexts)
      .numbers("--q-len", o.q_lens)
      .text("--meta", o.meta)
      .number("--window", o.window)
      .number("--sinks", o.sinks)
      .number("--rollback", o.rollback)
      .number("--warmup", o.warmup)
      .number("--reps", o.repetitions)
      .number("--calls", o.calls)
      .number("--working-set", o.working_set_mb)
      .flag("--graph", o.graph)
      .flag("--split", o.split)
      .text("--json", o.json);
  arguments.parse(argc, argv);
  return o;
}

// Throws std::invalid_argument for values that no case can have.
inline void check(const GpuOptions& o) {
  for (const std::string& op : o.ops) {
    require(op == "quantize" || op == "append" || op == "flush" || op == "decode",
            "--op: possible are quantize, append, flush and decode");
  }
  for (const auto* axis : {&o.heads, &o.ratios, &o.batches, &o.q_lens}) {
    for (const int value : *axis) require(value > 0, "--heads, --ratio, --batch and --q-len must be 1 or more");
  }
  for (const int q_len : o.q_lens) {
    require(q_len <= o.rollback + 1,
            "--q-len must be at most --rollback + 1: more queries would not see what they should");
  }
  for (const int context : o.contexts) {
    require(context > o.sinks + o.window + kTileTokens,
            "--context must be more than sinks + window + 64, so that something is packed");
  }
  require(o.repetitions > 0 && o.calls > 0, "--reps and --calls must be 1 or more");
}

inline std::vector<Case> cases(const GpuOptions& o) {
  std::vector<Case> all;
  const auto add = [&](const Scheme& scheme, int head_dim, int group, const std::string& dtype, int heads, int ratio,
                       int batch, int context, int q_len, const std::string& op) {
    const RecordFormat format = parse_record_format(scheme.k, scheme.v, group, o.meta, "mma", head_dim);
    if (op != "decode" && (q_len != o.q_lens.front() || ratio != o.ratios.front())) return;  // they know no queries
    const int tokens = op == "quantize" ? context : 1;
    all.push_back({op, scheme, group, head_dim, heads, ratio, context, format, parse_dtype(dtype), tokens, o.window,
                   o.sinks, batch, q_len, o.rollback});
  };
  each_combination(add, o.schemes, o.head_dims, o.groups, o.dtypes, o.heads, o.ratios, o.batches, o.contexts, o.q_lens,
                   o.ops);
  return all;
}

}  // namespace skvq::bench

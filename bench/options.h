// Command line of bench_cpu: axes are comma-separated lists, and every combination of their values is measured.
#pragma once

#include <string>
#include <vector>

#include "case.h"

namespace skvq::bench {

struct Options {
  std::vector<std::string> ops = {"append", "decode"};
  std::vector<Scheme> schemes = {{"2", "1.5"}};
  std::vector<int> heads = {8}, ratios = {4}, head_dims = {128}, contexts = {4096, 32768}, groups = {128},
                   threads = {1};
  std::string meta = "fp8", arrangement = "lanes", dtype = "bf16", json;
  bool exact = true;
  int append_tokens = kTileTokens, window = 128, sinks = 5, warmup = 3, repetitions = 15, working_set_mib = 0;
};

inline constexpr const char* kUsage = R"(bench_cpu: time append and decode_attention of the packed cache on the CPU

axes (comma-separated, every combination is measured)
  --op LIST         append, decode                                   [append,decode]
  --scheme LIST     formats of K and V, e.g. k8-v8,k3:1/2+2-v1.5     [k2-v1.5]
  --group LIST      channels per group: 32, 64, 128 or 0 = head      [128]
  --head-dim LIST                                                    [128]
  --heads LIST      KV heads                                         [8]
  --ratio LIST      query heads per KV head                          [4]
  --context LIST    cached tokens                                    [4096,32768]
  --threads LIST                                                     [1]

settings
  --meta fp8|fp16            type of scales and zeros                [fp8]
  --arrangement lanes|rows                                           [lanes]
  --dtype f32|f16|bf16       queries, window and new tokens          [bf16]
  --math exact|integer       how packed tiles are read               [exact]
  --append-tokens N          tokens of one append call               [64]
  --window N, --sinks N      tokens kept in full precision           [128, 5]
  --warmup N, --reps N       calls before and in the measurement     [3, 15]
  --working-set MIB          caches to rotate over hold at least this much, 0: twice the last-level cache  [0]
  --json FILE                also write the results as JSON

SKVQ_CPU_ISA=portable|avx2|avx512 chooses the instruction set.
)";

inline Options parse_options(int argc, char** argv) {
  Options o;
  Arguments arguments;
  arguments.texts("--op", o.ops)
      .value("--scheme", [&](auto, auto value) { o.schemes = parse_schemes(value); })
      .numbers("--group", o.groups)
      .numbers("--head-dim", o.head_dims)
      .numbers("--heads", o.heads)
      .numbers("--ratio", o.ratios)
      .numbers("--context", o.contexts)
      .numbers("--threads", o.threads)
      .text("--meta", o.meta)
      .text("--arrangement", o.arrangement)
      .text("--dtype", o.dtype)
      .either("--math", "exact", "integer", o.exact)
      .number("--append-tokens", o.append_tokens)
      .number("--window", o.window)
      .number("--sinks", o.sinks)
      .number("--warmup", o.warmup)
      .number("--reps", o.repetitions)
      .number("--working-set", o.working_set_mib)
      .text("--json", o.json);
  arguments.parse(argc, argv);
  return o;
}

}  // namespace skvq::bench

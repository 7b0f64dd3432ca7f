// Time and memory traffic of append and decode_attention on the CPU. See --help.
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "json.h"
#include "memory.h"
#include "options.h"
#include "subject.h"

namespace skvq::bench {
namespace {

struct Result {
  Case c;
  int threads;
  Timing time;
  std::int64_t bytes;  // that a call must read and write
  std::size_t working_set, copies;
  double bandwidth;  // of reading, in bytes per second, on the same threads
  double frequency;  // of a core, in cycles per second

  // From the fastest call, like the bandwidth it is compared with: on a shared machine the median measures the others.
  double rate() const { return static_cast<double>(bytes) / time.min_s; }
  double percent() const { return 100.0 * rate() / bandwidth; }
  // Cycles of all threads for a token of one KV head: of the context for decode, of the call for append.
  double cycles() const {
    const double tokens = c.op == "append" ? c.append_tokens : c.context;
    return time.min_s * frequency * threads / (tokens * c.heads);
  }
};

Timing measure_append(const Case& c, const Options& o, Subjects& subjects) {
  return measure(
      o.warmup, o.repetitions, [&](int i) { subjects[i].set_length(c.context); },
      [&](int i) { cpu::append(subjects[i].append_args(c, subjects.rows(), c.append_tokens), kPool); });
}

Timing measure_decode(const Case& c, const Options& o, Subjects& subjects) {
  const std::int64_t q_heads = static_cast<std::int64_t>(c.heads) * c.ratio;
  const std::vector<std::uint8_t> q = random_rows(q_heads * c.head_dim, c.dtype);
  std::vector<std::uint8_t> out(q.size());
  std::vector<float> lse(q_heads);
  DecodeArgs args{};
  args.q = {q.data(), q_heads * c.head_dim, c.head_dim};
  args.queries = {nullptr, 1, 1};
  args.q_dtype = c.dtype;
  args.num_q_heads = static_cast<int>(q_heads);
  args.softmax_scale = 0.1f;
  args.queries_in_cache = true;
  args.exact = o.exact;
  args.out = out.data();
  args.lse = lse.data();
  return measure(
      o.warmup, o.repetitions, [&](int i) { args.cache = subjects[i].view(); },
      [&](int) { cpu::decode_attention(args, kPool); });
}

Result run(const Case& c, const Options& o, int threads, double bandwidth, double frequency) {
  const std::size_t working_set =
      o.working_set_mib > 0 ? std::size_t(o.working_set_mib) << 20 : 2 * last_level_cache_bytes();
  Subjects subjects(c, working_set);
  const bool append = c.op == "append";
  return {c,
          threads,
          append ? measure_append(c, o, subjects) : measure_decode(c, o, subjects),
          append ? append_bytes(c, c.context, c.append_tokens) : decode_bytes(c),
          subjects.bytes(),
          subjects.size(),
          bandwidth,
          frequency};
}

void check(const Options& o) {
  for (const auto& op : o.ops) require(op == "append" || op == "decode", "--op: possible are append and decode");
  for (const auto* axis : {&o.heads, &o.ratios, &o.threads}) {
    for (const int value : *axis) require(value > 0, "--heads, --ratio and --threads must be 1 or more");
  }
  for (const int context : o.contexts) {
    require(context > o.sinks + o.window + kTileTokens,
            "--context must be more than sinks + window + 64, so that something is packed");
  }
  require(o.repetitions > 0 && o.append_tokens > 0, "--reps and --append-tokens must be 1 or more");
}

std::vector<Case> cases(const Options& o) {
  std::vector<Case> all;
  const auto add = [&](const Scheme& scheme, int head_dim, int group, int heads, int ratio, int context,
                       const std::string& op) {
    const RecordFormat format = parse_record_format(scheme.k, scheme.v, group, o.meta, o.arrangement, head_dim);
    Case c{op,       scheme, group, head_dim, heads, ratio, context, format, parse_dtype(o.dtype), o.append_tokens,
           o.window, o.sinks};
    c.rollback = o.append_tokens;  // so that an append may be repeated from the same length
    all.push_back(c);
  };
  each_combination(add, o.schemes, o.head_dims, o.groups, o.heads, o.ratios, o.contexts, o.ops);
  return all;
}

void print(const Result& r) {
  const Case& c = r.c;
  std::printf("%-6s  k%-8s v%-8s %5d %4d %5d %5d %8d %3d %5.0f x%-3zu %8.2f %10.1f %10.1f %7.2f %6.1f %10.1f\n",
              c.op.c_str(), c.scheme.k.c_str(), c.scheme.v.c_str(), c.group, c.head_dim, c.heads, c.ratio, c.context,
              r.threads, static_cast<double>(r.working_set) / (1 << 20), r.copies, static_cast<double>(r.bytes) / 1e6,
              r.time.min_s * 1e6, r.time.median_s * 1e6, r.rate() / 1e9, r.percent(), r.cycles());
  std::fflush(stdout);
}

Json to_json(const Result& r) {
  const Case& c = r.c;
  return Json()
      .add("op", c.op)
      .add("k", c.scheme.k)
      .add("v", c.scheme.v)
      .add("group", c.group)
      .add("head_dim", c.head_dim)
      .add("num_kv_heads", c.heads)
      .add("ratio", c.ratio)
      .add("context", c.context)
      .add("threads", r.threads)
      .add("record_bytes", c.format.record_bytes())
      .add("working_set_bytes", r.working_set)
      .add("caches", r.copies)
      .add("bytes", r.bytes)
      .add("min_s", r.time.min_s)
      .add("median_s", r.time.median_s)
      .add("bytes_per_s", r.rate())
      .add("read_bandwidth_bytes_per_s", r.bandwidth)
      .add("percent_of_read_bandwidth", r.percent())
      .add("cycles_per_token_and_head", r.cycles());
}

void write_json(const Options& o, const std::vector<Result>& results) {
  std::vector<Json> rows;
  for (const Result& r : results) rows.push_back(to_json(r));
  write_json(o.json, Json()
                         .add("isa", cpu::kernels().isa)
                         .add("core_frequency", results.empty() ? 0.0 : results[0].frequency)
                         .add("last_level_cache_bytes", last_level_cache_bytes())
                         .add("dtype", o.dtype)
                         .add("meta", o.meta)
                         .add("arrangement", o.arrangement)
                         .add("window", o.window)
                         .add("sinks", o.sinks)
                         .add("append_tokens", o.append_tokens)
                         .add("warmup", o.warmup)
                         .add("repetitions", o.repetitions)
                         .add("results", rows));
}

void run_all(const Options& o) {
  check(o);
  std::printf("instruction set %s, last-level cache %.0f MiB, %s rows, %s scales, arrangement %s, %d repetitions\n",
              cpu::kernels().isa, static_cast<double>(last_level_cache_bytes()) / (1 << 20), o.dtype.c_str(),
              o.meta.c_str(), o.arrangement.c_str(), o.repetitions);
  const double frequency = core_frequency();
  std::printf("a core runs at %.2f GHz\n", frequency / 1e9);
  std::vector<Result> results;
  for (const int threads : o.threads) {
    const std::vector<Case> planned = cases(o);
    ThreadPool::instance().resize(threads);
    const double bandwidth = read_bandwidth(o.repetitions);
    std::printf("\nread bandwidth on %d thread%s: %.2f GB/s\n", threads, threads == 1 ? "" : "s", bandwidth / 1e9);
    std::printf("%-6s  %-9s %-9s %5s %4s %5s %5s %8s %3s %10s %8s %10s %10s %7s %6s %10s\n", "op", "K", "V", "group",
                "dim", "heads", "ratio", "context", "thr", "MiB set", "MB moved", "min us", "median us", "GB/s",
                "% read", "cyc/tok/hd");
    for (const Case& c : planned) {
      results.push_back(run(c, o, threads, bandwidth, frequency));
      print(results.back());
    }
  }
  if (!o.json.empty()) write_json(o, results);
}

}  // namespace
}  // namespace skvq::bench

int main(int argc, char** argv) {
  using namespace skvq::bench;
  return run_program("bench_cpu", kUsage, argc, argv, [&] {
    run_all(parse_options(argc, argv));
    return 0;
  });
}

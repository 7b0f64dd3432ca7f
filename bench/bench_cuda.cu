// Time and memory traffic of the operations on a CUDA device. See --help.
#include <cstdio>
#include <ctime>
#include <string>
#include <vector>

#include "gpu/measure.h"

namespace skvq::bench {
namespace {

struct Run {
  GpuOptions options;
  std::string command, started;
  Device device;
  double clock_before_hz = 0.0, clock_after_hz = 0.0;
  Bandwidth bandwidth{};
  std::vector<GpuResult> results;
};

std::string dtype_name(DType dtype) {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kF16 ? "f16" : "bf16";
}

// The same words in the same order as in the table of docs/gpu.md.
std::string case_name(const Case& c, bool graph) {
  const std::string group = c.group == 0 ? "ghead" : concat("g", c.group);
  const std::string name = concat(c.op, " k", c.scheme.k, "-v", c.scheme.v, "-", group, " ", dtype_name(c.dtype), " d",
                                  c.head_dim, " ", c.heads, "x", c.ratio, " b", c.batch, " n", c.context);
  return concat(name, c.op == "decode" ? concat(" q", c.q_len) : "", graph ? " graph" : "");
}

std::string now() {
  const std::time_t time = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&time));
  return text;
}

void print_header() {
  std::printf("\n%-60s %6s %9s %9s %10s %8s %8s %7s %7s\n", "case", "caches", "MB moved", "min us", "median us",
              "host us", "GB/s", "% copy", "% read");
}

void print(const GpuResult& r, const Run& run) {
  const std::string name = case_name(r.c, run.options.graph);
  if (!r.skipped.empty()) {
    std::printf("%-60s skipped: %s\n", name.c_str(), r.skipped.c_str());
    return;
  }
  const GpuTiming& t = r.time;
  std::printf("%-60s %6d %9.2f %9.2f %10.2f %8.2f %8.1f %7.1f %7.1f\n", name.c_str(), r.caches,
              static_cast<double>(r.bytes) / 1e6, t.device.min_s * 1e6, t.device.median_s * 1e6, t.host_s * 1e6,
              r.rate() / 1e9, 100 * r.rate() / run.bandwidth.copy(), 100 * r.rate() / run.bandwidth.read);
  for (const KernelShare& k : r.kernels) {
    std::printf("    %-40s %6u x %-5u blocks of %4u, %3d registers %9.2f %10.2f\n", k.name.c_str(), k.grid.x, k.grid.y,
                k.block.x, k.registers, k.time.device.min_s * 1e6, k.time.device.median_s * 1e6);
  }
  std::fflush(stdout);
}

Json to_json(const GpuResult& r, const Run& run) {
  const Case& c = r.c;
  Json json;
  json.add("name", case_name(c, run.options.graph))
      .add("op", c.op)
      .add("k", c.scheme.k)
      .add("v", c.scheme.v)
      .add("group", c.group)
      .add("dtype", dtype_name(c.dtype))
      .add("head_dim", c.head_dim)
      .add("num_kv_heads", c.heads)
      .add("ratio", c.ratio)
      .add("batch", c.batch)
      .add("context", c.context)
      .add("q_len", c.q_len)
      .add("graph", run.options.graph)
      .add("record_bytes", c.format.record_bytes())
      .add("bytes", r.bytes);
  if (!r.skipped.empty()) return json.add("skipped", r.skipped);
  std::vector<Json> kernels;
  for (const KernelShare& k : r.kernels) kernels.push_back(to_json(k, r.calls));
  return json.add("caches", r.caches)
      .add("calls", r.calls)
      .add("allocated_bytes", r.allocated)
      .add("workspace_bytes", r.workspace)
      .add("us", r.time.device.min_s * 1e6)
      .add("median_us", r.time.device.median_s * 1e6)
      .add("host_us", r.time.host_s * 1e6)
      .add("gb_per_s", r.rate() / 1e9)
      .add("percent_of_copy", 100 * r.rate() / run.bandwidth.copy())
      .add("percent_of_read", 100 * r.rate() / run.bandwidth.read)
      .add("kernels", kernels);
}

void write(const Run& run) {
  const GpuOptions& o = run.options;
  if (o.json.empty()) return;
  std::vector<Json> results;
  for (const GpuResult& r : run.results) results.push_back(to_json(r, run));
  write_json(o.json, Json()
                         .add("command", run.command)
                         .add("date", run.started)
                         .add("device", to_json(run.device))
                         .add("clock_before_hz", run.clock_before_hz)
                         .add("clock_after_hz", run.clock_after_hz)
                         .add("bandwidth", to_json(run.bandwidth))
                         .add("built", cuda::decode_instances())
                         .add("meta", o.meta)
                         .add("window", o.window)
                         .add("sinks", o.sinks)
                         .add("rollback", o.rollback)
                         .add("repetitions", o.repetitions)
                         .add("results", results));
}

// A case that no kernel was built for or that does not fit is skipped and says why; anything else ends the run.
void run_case(Run& run, const PassTimer& timer, cudaStream_t stream, const Case& c) {
  GpuResult r;
  r.c = c;
  const std::size_t set =
      run.options.working_set_mb > 0 ? std::size_t(run.options.working_set_mb) * 1'000'000 : run.device.working_set();
  try {
    measure_case(run.options, timer, stream, set, r);
  } catch (const std::length_error& error) {
    r.skipped = error.what();
  } catch (const std::invalid_argument& error) {
    r.skipped = error.what();
  }
  run.results.push_back(std::move(r));
  print(run.results.back(), run);
}

void run_all(const GpuOptions& options, const std::string& command) {
  check(options);
  const std::vector<Case> planned = cases(options);
  Run run;
  run.options = options;
  run.command = command;
  run.started = now();
  cuda::check_device();
  const Stream stream;
  run.clock_before_hz = measured_clock_hz(run.device, stream);
  run.bandwidth = measure_bandwidth(run.device, stream, options.repetitions);
  std::printf(
      "%s, %d multiprocessors at %.0f MHz, L2 %.0f MB; copy %.0f GB/s (kernel %.0f, engine %.0f), read %.0f GB/s\n",
      run.device.name.c_str(), run.device.multiprocessors, run.clock_before_hz / 1e6,
      static_cast<double>(run.device.l2_bytes) / 1e6, run.bandwidth.copy() / 1e9, run.bandwidth.copy_kernel / 1e9,
      run.bandwidth.copy_engine / 1e9, run.bandwidth.read / 1e9);
  print_header();
  const PassTimer timer(stream, run.device.peak_clock_hz);
  for (const Case& c : planned) {
    run_case(run, timer, stream, c);
    write(run);
  }
  run.clock_after_hz = measured_clock_hz(run.device, stream);
  write(run);
}

}  // namespace
}  // namespace skvq::bench

int main(int argc, char** argv) {
  using namespace skvq::bench;
  return run_program("bench_cuda", kGpuUsage, argc, argv, [&] {
    std::string command;
    for (int i = 0; i < argc; ++i) command += (i > 0 ? " " : "") + std::string(argv[i]);
    run_all(parse_gpu_options(argc, argv), command);
    return 0;
  });
}

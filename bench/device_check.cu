// The CUDA backend on a device against the CPU backend: bytes of append and of the operations on tensors, attention
// within a derived tolerance, one CUDA graph over growing lengths. See --help.
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "gpu/check_graph.h"
#include "gpu/check_tensors.h"
#include "gpu/device.h"

namespace skvq::bench {
namespace {

constexpr const char* kUsage = R"(device_check: the CUDA backend against the CPU backend

  --only LIST    append, decode, tensors, graph   [all]
  --small        a few cases of each: for tools that make everything slow
  --no-poison    leave device memory as it was allocated, for tools that look for reads of such memory;
                 caches are not compared then
  --json FILE    also write the findings as JSON

Exits with 1 where a check fails.
)";

struct DeviceOptions {
  CheckOptions checks;
  std::vector<std::string> only = {"append", "decode", "tensors", "graph"};
  bool no_poison = false;
  std::string json;
};

int run_all(const DeviceOptions& o) {
  const Device device;
  cuda::check_device();
  ThreadPool::instance().resize(static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  const Stream stream;
  Findings findings;
  findings.on_add([&] {
    if (o.json.empty()) return;
    write_json(o.json, Json()
                           .add("device", to_json(device))
                           .add("built", cuda::decode_instances())
                           .add("failed", findings.failed())
                           .add("findings", findings.all()));
  });
  for (const std::string& part : o.only) {
    if (part == "append") check_append(findings, o.checks, stream);
    if (part == "decode") check_decode(findings, o.checks, stream);
    if (part == "tensors") check_tensors(findings, o.checks, stream);
    if (part == "graph") check_graph(findings, o.checks, stream);
  }
  std::printf("%s: %d findings, %d failed\n", device.name.c_str(), findings.count(), findings.failed());
  return findings.failed() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace skvq::bench

int main(int argc, char** argv) {
  using namespace skvq::bench;
  return run_program("device_check", kUsage, argc, argv, [&] {
    DeviceOptions o;
    Arguments()
        .texts("--only", o.only)
        .flag("--small", o.checks.small)
        .flag("--no-poison", o.no_poison)
        .text("--json", o.json)
        .parse(argc, argv);
    for (const std::string& part : o.only) {
      require(part == "append" || part == "decode" || part == "tensors" || part == "graph",
              "--only: possible are append, decode, tensors and graph");
    }
    o.checks.poison = !o.no_poison;
    return run_all(o);
  });
}

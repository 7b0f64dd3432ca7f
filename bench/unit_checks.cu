// Whether the device does what csrc/cuda takes for granted, instruction by instruction, and what its memory can do.
// Needs no kernel of the library. See --help.
#include <cstdio>
#include <string>

#include "arguments.h"
#include "gpu/ceiling.h"
#include "gpu/check_copies.h"
#include "gpu/check_matrices.h"
#include "gpu/check_numbers.h"

namespace skvq::bench {
namespace {

constexpr const char* kUsage = R"(unit_checks: instructions and memory of a CUDA device

  --no-bandwidth   instructions only
  --reps N         repetitions of what is timed   [10]
  --json FILE      also write the findings as JSON

Exits with 1 where a check fails.
)";

struct UnitOptions {
  bool no_bandwidth = false;
  int repetitions = 10;
  std::string json;
};

int run_all(const UnitOptions& o) {
  const Device device;
  cuda::check_device();
  Findings findings;
  Json report;
  report.add("device", to_json(device));
  findings.on_add([&] {
    if (o.json.empty()) return;
    write_json(o.json, Json(report).add("failed", findings.failed()).add("findings", findings.all()));
  });
  check_numbers(findings);
  check_matrices(findings);
  check_copies(findings, device.major >= 9);
  if (!o.no_bandwidth) {
    const Stream stream;
    report.add("clock_hz", measured_clock_hz(device, stream));
    const Bandwidth bandwidth = measure_bandwidth(device, stream, o.repetitions);
    report.add("bandwidth", to_json(bandwidth));
    findings.add("copy bandwidth", true, concat(bandwidth.copy() / 1e9, " GB/s; reading ", bandwidth.read / 1e9),
                 to_json(bandwidth));
    measure_ceilings(findings, device, stream, bandwidth, o.repetitions);
  }
  std::printf("%s: %d findings, %d failed\n", device.name.c_str(), findings.count(), findings.failed());
  return findings.failed() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace skvq::bench

int main(int argc, char** argv) {
  using namespace skvq::bench;
  return run_program("unit_checks", kUsage, argc, argv, [&] {
    UnitOptions o;
    Arguments()
        .flag("--no-bandwidth", o.no_bandwidth)
        .number("--reps", o.repetitions)
        .text("--json", o.json)
        .parse(argc, argv);
    require(o.repetitions > 0, "--reps must be 1 or more");
    return run_all(o);
  });
}

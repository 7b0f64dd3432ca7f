// What the device is, and how fast it turns.
#pragma once

#include <algorithm>
#include <string>

#include "gpu/pass_timer.h"
#include "json.h"

namespace skvq::bench {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cuda_check(cudaGetDevice(&device), "asking for the device");
  cuda_check(cudaDeviceGetAttribute(&value, attribute, device), "asking for a property of the device");
  return value;
}

struct Device {
  std::string name;
  int major, minor, multiprocessors, driver, runtime;
  std::size_t l2_bytes, memory_bytes;
  double peak_clock_hz;

  Device() {
    int device = 0;
    cudaDeviceProp properties{};
    cuda_check(cudaGetDevice(&device), "looking for a CUDA device");
    cuda_check(cudaGetDeviceProperties(&properties, device), "reading the properties of the device");
    cuda_check(cudaDriverGetVersion(&driver), "asking for the version of the driver");
    cuda_check(cudaRuntimeGetVersion(&runtime), "asking for the version of the runtime");
    name = properties.name;
    major = properties.major;
    minor = properties.minor;
    multiprocessors = properties.multiProcessorCount;
    l2_bytes = static_cast<std::size_t>(properties.l2CacheSize);
    memory_bytes = properties.totalGlobalMem;
    peak_clock_hz = 1e3 * device_attribute(cudaDevAttrClockRate);
  }

  // What caches must hold together so that none finds itself in the L2.
  std::size_t working_set() const { return std::max(2 * l2_bytes, std::size_t{200'000'000}); }
};

inline std::size_t free_bytes() {
  std::size_t free = 0, total = 0;
  cuda_check(cudaMemGetInfo(&free, &total), "asking for free memory");
  return free;
}

// The clock of the multiprocessors as it is now, from cycles counted between two events.
inline double measured_clock_hz(const Device& device, cudaStream_t stream) {
  const double seconds = 0.02;
  const auto cycles = static_cast<long long>(seconds * device.peak_clock_hz);
  const Event start, stop;
  start.record(stream);
  cuda::launch("spin", spin, {1}, 1, 0, stream, cycles);
  stop.record(stream);
  return static_cast<double>(cycles) / stop.seconds_since(start);
}

inline Json to_json(const Device& d) {
  return Json()
      .add("name", d.name)
      .add("compute_capability", concat(d.major, ".", d.minor))
      .add("multiprocessors", d.multiprocessors)
      .add("l2_bytes", d.l2_bytes)
      .add("memory_bytes", d.memory_bytes)
      .add("driver", d.driver)
      .add("runtime", d.runtime)
      .add("peak_clock_hz", d.peak_clock_hz)
      .add("peak_memory_clock_hz", 1e3 * device_attribute(cudaDevAttrMemoryClockRate))
      .add("memory_bus_bits", device_attribute(cudaDevAttrGlobalMemoryBusWidth))
      .add("ecc", device_attribute(cudaDevAttrEccEnabled) != 0);
}

}  // namespace skvq::bench

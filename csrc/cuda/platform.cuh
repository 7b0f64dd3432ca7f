// The one file that knows who compiles the kernels: nvcc for a GPU, or a host compiler for the emulator in tests/simt,
// which executes the same sources thread by thread (docs/simt.md).
#pragma once

#include <cstdint>

#if defined(SKVQ_SIMT)
#include "simt/cuda_names.h"
// Every collective remembers where it was called, for reports.
#define SKVQ_HERE ::simt::Location here = ::simt::Location::current()
#define SKVQ_AND_HERE , SKVQ_HERE
#else
#include <cuda_runtime.h>
#define SKVQ_HERE
#define SKVQ_AND_HERE
// A struct in shared memory: its arrays are members, so that sanitizers see their ends.
#define SKVQ_SHARED(T, name) __shared__ T name
// Dynamic shared memory as bytes.
#define SKVQ_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#define SKVQ_DEVICE __device__ __forceinline__

namespace skvq::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

SKVQ_DEVICE int lane_index() {
  return static_cast<int>(threadIdx.x) % kWarp;
}
SKVQ_DEVICE int warp_index() {
  return static_cast<int>(threadIdx.x) / kWarp;
}

}  // namespace skvq::cuda

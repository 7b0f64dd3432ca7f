// What the CUDA runtime says of the device and of launches, as exceptions.
#include <stdexcept>
#include <string>

#include "core/format_text.h"
#include "cuda/launch.cuh"

#if !defined(SKVQ_CUDA_ARCHS)
#define SKVQ_CUDA_ARCHS "unknown"
#endif

namespace skvq::cuda {

#if defined(SKVQ_SIMT)

// The emulator throws by itself; it plays a device small enough that tests cross its borders.
void check_launch(const char*, Grid, int, std::size_t) {}
int multiprocessors() {
  return simt::config().multiprocessors;
}
int shared_bytes_per_multiprocessor() {
  return 228 * 1024;
}
void allow_shared_bytes(const void*, const char*, std::size_t) {}
void check_device() {}

#else

namespace {

std::string device_text() {
  int device = 0;
  cudaDeviceProp properties{};
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    (void)cudaGetLastError();
    return "unknown";
  }
  return concat(properties.name, " (sm_", properties.major, properties.minor, ")");
}

[[noreturn]] void fail(cudaError_t error, const std::string& what) {
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    throw std::runtime_error(concat("skvq_ext was built for the CUDA architectures ", SKVQ_CUDA_ARCHS,
                                    ", none of which runs on this GPU, ", device_text(),
                                    ": rebuild with TORCH_CUDA_ARCH_LIST set to its compute capability"));
  }
  throw std::runtime_error(concat(what, " failed on ", device_text(), ": ", cudaGetErrorString(error),
                                  ". The error may be that of an earlier kernel; CUDA_LAUNCH_BLOCKING=1 tells."));
}

int attribute(cudaDeviceAttr which, const char* what) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) fail(error, what);
  return value;
}

__global__ void probe() {}

}  // namespace

void check_launch(const char* kernel, Grid grid, int threads, std::size_t shared_bytes) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  fail(error, concat("launching ", kernel, " with ", grid.x, " x ", grid.y, " blocks of ", threads, " threads and ",
                     shared_bytes, " bytes of shared memory"));
}

int multiprocessors() {
  return attribute(cudaDevAttrMultiProcessorCount, "asking for the number of multiprocessors");
}

int shared_bytes_per_multiprocessor() {
  return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, "asking for the size of shared memory");
}

void allow_shared_bytes(const void* kernel, const char* name, std::size_t bytes) {
  if (bytes <= 48 * 1024) return;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) fail(error, concat("asking for ", bytes, " bytes of shared memory for ", name));
}

void check_device() {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error != cudaSuccess) fail(error, "looking for kernels");
}

#endif

}  // namespace skvq::cuda

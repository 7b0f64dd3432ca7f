// A CUDA runtime without a device: the host code of csrc/cuda runs as it is, and each of its launches goes to a
// function that tests/ptx/backend.py sets, with the kernel's name, grid, shared memory and arguments. What is missing
// here fails when the library is linked.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <unordered_map>

namespace {

using Launcher = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, std::size_t shared_bytes,
                         void** arguments);
using Filler = int (*)(void* address, int value, std::size_t bytes);

struct Configuration {
  dim3 grid, block;
  std::size_t shared_bytes;
  cudaStream_t stream;
};

Launcher launcher = nullptr;
Filler filler = nullptr;
Configuration configuration;
cudaError_t last_error = cudaSuccess;
int multiprocessor_count = 1, multiprocessor_shared_bytes = 0;

// Kernels by the address of their stub on the host. A function, because registration comes before constructors.
std::unordered_map<const void*, const char*>& kernels() {
  static std::unordered_map<const void*, const char*> names;
  return names;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes) {
  const unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  const auto found = kernels().find(kernel);
  const bool fine = launcher != nullptr && found != kernels().end() &&
                    launcher(found->second, blocks, threads, shared_bytes, arguments) == 0;
  last_error = fine ? cudaSuccess : cudaErrorLaunchFailure;
  return last_error;
}

}  // namespace

extern "C" {

void ptx_device(Launcher launch_kernel, Filler fill, int multiprocessors, int shared_bytes) {
  launcher = launch_kernel;
  filler = fill;
  multiprocessor_count = multiprocessors;
  multiprocessor_shared_bytes = shared_bytes;
}

// ---- What nvcc writes into every file with kernels ----

void** CUDARTAPI __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void CUDARTAPI __cudaRegisterFatBinaryEnd(void**) {}
void CUDARTAPI __cudaUnregisterFatBinary(void**) {}
char CUDARTAPI __cudaInitModule(void**) {
  return 0;
}
void CUDARTAPI __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
void CUDARTAPI __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*,
                                      dim3*, int*) {
  kernels()[stub] = name;
}
unsigned CUDARTAPI __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream) {
  configuration = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t CUDARTAPI __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared_bytes, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  std::memcpy(stream, &configuration.stream, sizeof configuration.stream);
  return cudaSuccess;
}

// ---- Launches: before CUDA 13 by the stub's address, since then by a handle, which here is that address ----

cudaError_t CUDARTAPI cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                       std::size_t shared_bytes, cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared_bytes);
}
#if CUDART_VERSION >= 13000
cudaError_t CUDARTAPI __cudaGetKernel(cudaKernel_t* handle, const void* kernel) {
  *handle = static_cast<cudaKernel_t>(const_cast<void*>(kernel));
  return cudaSuccess;
}
cudaError_t CUDARTAPI __cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void** arguments,
                                         std::size_t shared_bytes, cudaStream_t) {
  return launch(handle, grid, block, arguments, shared_bytes);
}
#endif

// ---- The runtime as csrc/cuda calls it ----

cudaError_t CUDARTAPI cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* CUDARTAPI cudaGetErrorString(cudaError_t) {
  return "the interpreter raised an error";
}
cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "the PTX interpreter");
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessor_count;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = multiprocessor_shared_bytes;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
cudaError_t CUDARTAPI cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t) {
  return filler(address, value, bytes) == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

}  // extern "C"

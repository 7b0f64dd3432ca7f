// Launching a kernel: on the caller's stream, with a check that names the kernel and its grid.
#pragma once

#include <cstddef>

#include "cuda/cuda.h"
#include "cuda/platform.cuh"

namespace skvq::cuda {

struct Grid {
  std::int64_t x;
  std::int64_t y = 1;
};

// csrc/cuda/device.cu. Throws std::runtime_error for a failed launch of `kernel`; does nothing where none failed.
void check_launch(const char* kernel, Grid grid, int threads, std::size_t shared_bytes);
// Of the current device.
int multiprocessors();
int shared_bytes_per_multiprocessor();
// Lets `kernel` use more dynamic shared memory than the 48 KiB that need no permission.
void allow_shared_bytes(const void* kernel, const char* name, std::size_t bytes);

// Blocks are counted by x first. A grid without blocks launches nothing.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads, std::size_t shared_bytes,
            Stream stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
#if defined(SKVQ_SIMT)
  (void)name, (void)stream;
  simt::launch(kernel, blocks, dim3(threads), shared_bytes, arguments...);
#else
  allow_shared_bytes(reinterpret_cast<const void*>(kernel), name, shared_bytes);
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  check_launch(name, grid, threads, shared_bytes);
#endif
}

}  // namespace skvq::cuda

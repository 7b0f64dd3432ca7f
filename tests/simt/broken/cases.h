// Kernels with one bug each, beside the same kernel without it: what the emulator and the sanitizers must notice.
#pragma once

#include <vector>

#include "cuda/ptx.cuh"

namespace simt::broken {

inline constexpr int kBlocks = 3, kThreads = 128;
inline constexpr int kWords = kBlocks * kThreads * 4;  // of the input: 16 bytes for each thread
inline constexpr int kDynamicBytes = 1024;

// Input word i.
constexpr int input(int i) {
  return i * 7 + 1;
}

using Kernel = void (*)(int* out, const int* in);

struct Case {
  const char* name;
  Kernel right, broken;
  int (*expected)(int block, int thread);  // out[block * kThreads + thread]
};
using Cases = std::vector<Case>;

Cases barriers();
Cases warps();
Cases copies();
Cases bulk_copies();
Cases memory();

// Each kernel is a template <bool bad>.
#define SIMT_CASE(name, expected)            \
  Case {                                     \
    #name, name<false>, name<true>, expected \
  }

// Where this thread's result goes.
SKVQ_DEVICE int out_index() {
  return static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
}

}  // namespace simt::broken

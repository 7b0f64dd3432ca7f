// Function qualifiers shared by host and device code.
#pragma once

// Everything in include/ and csrc/core is force-inlined: the CPU kernels compile the same headers once per
// instruction set, and an out-of-line copy built with AVX-512 must never be the one the linker keeps for all.
#if defined(__CUDACC__)
#define SKVQ_FN __host__ __device__ __forceinline__
#else
#define SKVQ_FN [[gnu::always_inline]] inline
#endif

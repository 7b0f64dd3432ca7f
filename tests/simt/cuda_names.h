// What a kernel source names of CUDA, on the emulator: csrc/cuda/platform.cuh includes it instead of cuda_runtime.h
// where SKVQ_SIMT is defined. No header of the toolkit is needed. What stands nowhere here, __shared__ and
// __activemask among it, does not compile, and should not be used.
#pragma once

#include <math.h>

#include <algorithm>

#include "simt/atomics.h"
#include "simt/launch.h"
#include "simt/matrix.h"

#define threadIdx (::simt::current->index)
#define blockIdx (::simt::current->block->index)
#define blockDim (::simt::current->block->threads)
#define gridDim (::simt::current->block->blocks)
inline constexpr int warpSize = 32;

#define SIMT_HERE ::simt::Location here = ::simt::Location::current()

// ---- barriers and fences ----

inline void __syncthreads(SIMT_HERE) {
  simt::sync_block("__syncthreads", simt::Vote::kNone, 0, here);
}
inline int __syncthreads_or(int predicate, SIMT_HERE) {
  return simt::sync_block("__syncthreads_or", simt::Vote::kOr, predicate, here);
}
inline int __syncthreads_and(int predicate, SIMT_HERE) {
  return simt::sync_block("__syncthreads_and", simt::Vote::kAnd, predicate, here);
}
inline int __syncthreads_count(int predicate, SIMT_HERE) {
  return simt::sync_block("__syncthreads_count", simt::Vote::kCount, predicate, here);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE) {
  simt::sync_warp(mask, here);
}
inline void __threadfence() {
  simt::fence(simt::Fence::kDevice);
}
inline void __threadfence_block() {
  simt::fence(simt::Fence::kBlock);
}

// ---- collectives of a warp ----

#define SIMT_SHUFFLE(name, mode, Argument)                                                     \
  template <class T>                                                                           \
  T name(unsigned mask, T value, Argument argument, int width = 32, SIMT_HERE) {               \
    return simt::shuffle<simt::Shuffle::mode>(#name, mask, value, int(argument), width, here); \
  }
SIMT_SHUFFLE(__shfl_sync, kIndex, int)
SIMT_SHUFFLE(__shfl_up_sync, kUp, unsigned)
SIMT_SHUFFLE(__shfl_down_sync, kDown, unsigned)
SIMT_SHUFFLE(__shfl_xor_sync, kXor, int)
#undef SIMT_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::ballot("__ballot_sync", mask, predicate != 0, here);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::ballot("__any_sync", mask, predicate != 0, here) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::ballot("__all_sync", mask, predicate == 0, here) == 0;
}

#define SIMT_REDUCTION(name, expression)                                     \
  namespace simt {                                                           \
  struct name##_operation {                                                  \
    template <class T>                                                       \
    SIMT_RUNTIME static T apply(T a, T b) {                                  \
      return static_cast<T>(expression);                                     \
    }                                                                        \
  };                                                                         \
  }                                                                          \
  inline unsigned name(unsigned mask, unsigned value, SIMT_HERE) {           \
    return simt::reduce(#name, mask, value, here, simt::name##_operation{}); \
  }
#define SIMT_SIGNED_REDUCTION(name)                                          \
  inline int name(unsigned mask, int value, SIMT_HERE) {                     \
    return simt::reduce(#name, mask, value, here, simt::name##_operation{}); \
  }
SIMT_REDUCTION(__reduce_add_sync, unsigned(a) + unsigned(b))
SIMT_SIGNED_REDUCTION(__reduce_add_sync)
SIMT_REDUCTION(__reduce_min_sync, b < a ? b : a)
SIMT_SIGNED_REDUCTION(__reduce_min_sync)
SIMT_REDUCTION(__reduce_max_sync, a < b ? b : a)
SIMT_SIGNED_REDUCTION(__reduce_max_sync)
SIMT_REDUCTION(__reduce_and_sync, a& b)
SIMT_REDUCTION(__reduce_or_sync, a | b)
SIMT_REDUCTION(__reduce_xor_sync, a ^ b)
#undef SIMT_REDUCTION
#undef SIMT_SIGNED_REDUCTION

// ---- atomics ----

#define SIMT_ATOMIC(name, expression)                             \
  template <class T>                                              \
  T name(T* p, std::type_identity_t<T> value) {                   \
    return simt::atomic(p, [&](T old) { return T(expression); }); \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMax, old < value ? value : old)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicExch, ((void)old, value))
SIMT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef SIMT_ATOMIC
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return simt::atomic(p, [&](T old) { return old == expected ? value : old; });
}

// ---- loads and stores with a cache hint ----

#define SIMT_LOAD(name) \
  template <class T>    \
  T name(const T* p) {  \
    const T value = *p; \
    return value;       \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldlu)
#undef SIMT_LOAD
#define SIMT_STORE(name)                           \
  template <class T>                               \
  void name(T* p, std::type_identity_t<T> value) { \
    *p = value;                                    \
  }
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwb)
SIMT_STORE(__stwt)
#undef SIMT_STORE

// ---- arithmetic. The emulator is compiled without contraction, so `a * b` is one rounding. ----

inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float a) {
  return 1.0f / a;
}
inline float __fsqrt_rn(float a) {
  return ::sqrtf(a);
}
inline float __saturatef(float x) {
  return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
}
inline float rsqrtf(float x) {
  return 1.0f / ::sqrtf(x);
}

inline unsigned __float_as_uint(float x) {
  return __builtin_bit_cast(unsigned, x);
}
inline int __float_as_int(float x) {
  return __builtin_bit_cast(int, x);
}
inline float __uint_as_float(unsigned x) {
  return __builtin_bit_cast(float, x);
}
inline float __int_as_float(int x) {
  return __builtin_bit_cast(float, x);
}
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  return x >= 0x1p31f ? 0x7fffffff : x <= -0x1p31f ? -0x7fffffff - 1 : static_cast<int>(::nearbyintf(x));
}
inline float __int2float_rn(int x) {
  return static_cast<float>(x);
}
inline float __uint2float_rn(unsigned x) {
  return static_cast<float>(x);
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> 4 * i & 15u;
    const unsigned byte = static_cast<unsigned>(bytes >> 8 * (s & 7u)) & 0xffu;
    result |= (s & 8u ? (byte & 0x80u ? 0xffu : 0u) : byte) << 8 * i;
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  const unsigned long long bits = static_cast<unsigned long long>(high) << 32 | low;
  return static_cast<unsigned>(bits << (shift & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  const unsigned long long bits = static_cast<unsigned long long>(high) << 32 | low;
  return static_cast<unsigned>(bits >> (shift & 31u));
}
inline int __dp4a(int a, int b, int c) {
  unsigned sum = static_cast<unsigned>(c);
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<unsigned>(static_cast<signed char>(a >> 8 * i) * static_cast<signed char>(b >> 8 * i));
  }
  return static_cast<int>(sum);
}

using std::max;
using std::min;
inline float max(float a, float b) {
  return ::fmaxf(a, b);
}
inline float min(float a, float b) {
  return ::fminf(a, b);
}

// CUDA's qualifiers and vector types.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define SIMT_VECTOR_TYPES(Name, T)                       \
  struct alignas(2 * sizeof(T)) Name##2 {                \
    T x, y;                                              \
  };                                                     \
  struct alignas(4 * sizeof(T)) Name##4 {                \
    T x, y, z, w;                                        \
  };                                                     \
  constexpr Name##2 make_##Name##2(T x, T y) {           \
    return {x, y};                                       \
  }                                                      \
  constexpr Name##4 make_##Name##4(T x, T y, T z, T w) { \
    return {x, y, z, w};                                 \
  }
SIMT_VECTOR_TYPES(int, int)
SIMT_VECTOR_TYPES(uint, unsigned)
SIMT_VECTOR_TYPES(float, float)
#undef SIMT_VECTOR_TYPES

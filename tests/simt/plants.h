// Faults planted in the kernels that are in use, to see that the tests find them. Included before everything else in
// sources compiled for a plant (tests/simt/CMakeLists.txt). What is renamed here was defined before, so that only the
// kernels' calls change. Missing barriers need no plant: SKVQ_SIMT_SKIP leaves one out (simt/config.h).
#pragma once

#include "core/minifloat.h"
#include "cuda/ptx.cuh"

namespace skvq {

namespace cuda::ptx {

// The last wait stays: without it the emulator would only notice that copies are never waited for.
template <int Pending>
void wait_for_last_copies() {
  if constexpr (Pending == 0) wait_copies<0>();
}

inline void wait_for_other_parity(std::uint64_t* barrier, std::uint32_t parity, SIMT_HERE) {
  barrier_wait(barrier, parity ^ 1u, here);
}

// Registers 1 and 2 of A hold rows 8 to 15 and columns 8 to 15.
inline void mma_f16_of_swapped(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                               SIMT_HERE) {
  const std::uint32_t swapped[4] = {a[0], a[2], a[1], a[3]};
  mma_f16(d, swapped, b0, b1, here);
}

inline void copy_bulk_too_far(void* to, const void* from, std::uint32_t bytes, std::uint64_t* barrier, SIMT_HERE) {
  copy_bulk(to, static_cast<const unsigned char*>(from) + 16, bytes, barrier, here);
}

}  // namespace cuda::ptx

inline void store_float_at_next(DType dtype, void* data, std::int64_t index, float x) {
  store_float(dtype, data, index + 1, x);
}

}  // namespace skvq

#if defined(SKVQ_PLANT_NO_WAIT)
#define wait_copies wait_for_last_copies
#elif defined(SKVQ_PLANT_WRONG_PARITY)
#define barrier_wait wait_for_other_parity
#elif defined(SKVQ_PLANT_FRAGMENT_ORDER)
#define mma_f16 mma_f16_of_swapped
#elif defined(SKVQ_PLANT_READ_PAST_END)
#define copy_bulk copy_bulk_too_far
#elif defined(SKVQ_PLANT_WRITE_PAST_END)
#define store_float store_float_at_next
#else
#error "plants.h is included without a plant"
#endif

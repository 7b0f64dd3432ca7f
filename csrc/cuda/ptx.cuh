// Every PTX instruction that the kernels name, one function each, and its twin for the emulator. No inline assembly
// stands anywhere else. Section titles are those of the PTX ISA manual.
#pragma once

#include "core/minifloat.h"
#include "cuda/platform.cuh"

namespace skvq::cuda::ptx {

#if !defined(SKVQ_SIMT)
SKVQ_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// ---- Arithmetic ----

// "Floating Point Instructions: ex2". 2^x, relative error 2^-22; subnormal results are 0.
SKVQ_DEVICE float ex2(float x) {
#if defined(SKVQ_SIMT)
  return simt::ex2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// "Floating Point Instructions: rcp". 1 / x, relative error 2^-23.
SKVQ_DEVICE float reciprocal(float x) {
#if defined(SKVQ_SIMT)
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// "Data Movement and Conversion Instructions: cvt". Two floats to nearest halves; `low` goes to bits 0 to 15.
SKVQ_DEVICE std::uint32_t pack_f16(float low, float high) {
#if defined(SKVQ_SIMT)
  return float_to_half(low) | static_cast<std::uint32_t>(float_to_half(high)) << 16;
#else
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}
SKVQ_DEVICE std::uint32_t pack_bf16(float low, float high) {
#if defined(SKVQ_SIMT)
  return float_to_bf16(low) | static_cast<std::uint32_t>(float_to_bf16(high)) << 16;
#else
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

struct Floats2 {
  float low, high;
};

SKVQ_DEVICE Floats2 unpack_f16(std::uint32_t pair) {
#if defined(SKVQ_SIMT)
  return {half_to_float(static_cast<std::uint16_t>(pair)), half_to_float(static_cast<std::uint16_t>(pair >> 16))};
#else
  Floats2 f;
  asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(f.low), "=f"(f.high)
      : "r"(pair));
  return f;
#endif
}
SKVQ_DEVICE Floats2 unpack_bf16(std::uint32_t pair) {
  return {bits_float(pair << 16), bits_float(pair & 0xffff0000u)};
}

// Two E4M3 numbers (bits 0 to 15) to halves, exactly; NaN stays NaN. An instruction from sm_89 on.
SKVQ_DEVICE std::uint32_t unpack_e4m3(std::uint32_t pair) {
#if defined(SKVQ_SIMT)
  return pack_f16(e4m3_to_float(static_cast<std::uint8_t>(pair)), e4m3_to_float(static_cast<std::uint8_t>(pair >> 8)));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  std::uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<std::uint16_t>(pair)));
  return halves;
#else
  // Exponent and mantissa moved to their places are the value times 2^-8, subnormals included.
  const std::uint32_t spread = (pair & 0xffu) | (pair & 0xff00u) << 8, magnitude = spread & 0x007f007fu;
  std::uint32_t halves;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(magnitude << 7), "r"(0x5c005c00u));
  const std::uint32_t nan = ((magnitude + 0x00010001u) & 0x00800080u) * 0xfcu;  // 0x7e00 where magnitude is 0x7f
  return halves | (spread & 0x00800080u) << 8 | nan;
#endif
}

// "Half Precision Floating Point Instructions: add".
SKVQ_DEVICE std::uint32_t add_f16x2(std::uint32_t a, std::uint32_t b) {
#if defined(SKVQ_SIMT)
  const Floats2 x = unpack_f16(a), y = unpack_f16(b);
  return pack_f16(x.low + y.low, x.high + y.high);
#else
  std::uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
#endif
}

// "Floating Point Instructions: min, max" and "Half Precision Floating Point Instructions: min, max", with .NaN: a NaN
// among the operands is the result.
SKVQ_DEVICE float min_f32(float a, float b) {
#if defined(SKVQ_SIMT)
  return a != a ? a : b != b ? b : a < b ? a : b;
#else
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
  return least;
#endif
}
SKVQ_DEVICE float max_f32(float a, float b) {
#if defined(SKVQ_SIMT)
  return a != a ? a : b != b ? b : a > b ? a : b;
#else
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
#endif
}
SKVQ_DEVICE std::uint32_t min_f16x2(std::uint32_t a, std::uint32_t b) {
#if defined(SKVQ_SIMT)
  const Floats2 x = unpack_f16(a), y = unpack_f16(b);
  return pack_f16(min_f32(x.low, y.low), min_f32(x.high, y.high));
#else
  std::uint32_t least;
  asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
  return least;
#endif
}
SKVQ_DEVICE std::uint32_t max_f16x2(std::uint32_t a, std::uint32_t b) {
#if defined(SKVQ_SIMT)
  const Floats2 x = unpack_f16(a), y = unpack_f16(b);
  return pack_f16(max_f32(x.low, y.low), max_f32(x.high, y.high));
#else
  std::uint32_t most;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
#endif
}
SKVQ_DEVICE std::uint32_t min_bf16x2(std::uint32_t a, std::uint32_t b) {
#if defined(SKVQ_SIMT)
  const Floats2 x = unpack_bf16(a), y = unpack_bf16(b);
  return pack_bf16(min_f32(x.low, y.low), min_f32(x.high, y.high));
#else
  std::uint32_t least;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
  return least;
#endif
}
SKVQ_DEVICE std::uint32_t max_bf16x2(std::uint32_t a, std::uint32_t b) {
#if defined(SKVQ_SIMT)
  const Floats2 x = unpack_bf16(a), y = unpack_bf16(b);
  return pack_bf16(max_f32(x.low, y.low), max_f32(x.high, y.high));
#else
  std::uint32_t most;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
#endif
}

// ---- "Warp Level Matrix Multiply-Accumulate Instructions" ----

// d += A B, fp32 sums. A: 16 x 16 in `a` (skvq::Mma::owner); B: 16 x 8, lane l holds rows 2 (l % 4) + {0, 1} of column
// l / 4 in b0 and rows 8 more in b1; d: lane l holds row l / 4, columns 2 (l % 4) + {0, 1}, then row l / 4 + 8.
SKVQ_DEVICE void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1 SKVQ_AND_HERE) {
#if defined(SKVQ_SIMT)
  simt::mma_16816(d, a, b0, b1, simt::Half::kF16, here);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
SKVQ_DEVICE void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                          std::uint32_t b1 SKVQ_AND_HERE) {
#if defined(SKVQ_SIMT)
  simt::mma_16816(d, a, b0, b1, simt::Half::kBf16, here);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// "movmatrix". An 8 x 8 matrix of 16-bit elements, row l / 4 and columns 2 (l % 4) + {0, 1} in lane l, transposed.
SKVQ_DEVICE std::uint32_t transpose_8x8(std::uint32_t x SKVQ_AND_HERE) {
#if defined(SKVQ_SIMT)
  return simt::movmatrix(x, here);
#else
  std::uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
#endif
}

// "ldmatrix". Four 8 x 8 matrices of 16-bit elements from shared memory; lane 8 i + j names row j of matrix i.
SKVQ_DEVICE void load_matrices(std::uint32_t (&a)[4], const void* row SKVQ_AND_HERE) {
#if defined(SKVQ_SIMT)
  simt::ldmatrix_x4(a, row, false, here);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}
SKVQ_DEVICE void load_matrices_transposed(std::uint32_t (&a)[4], const void* row SKVQ_AND_HERE) {
#if defined(SKVQ_SIMT)
  simt::ldmatrix_x4(a, row, true, here);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// ---- "Data Movement and Conversion Instructions: Asynchronous copy", sm_80 ----

// 16 bytes from global to shared memory; only `source_bytes` are read, the rest is zero.
SKVQ_DEVICE void copy_async_16(void* to, const void* from, int source_bytes = 16 SKVQ_AND_HERE) {
#if defined(SKVQ_SIMT)
  simt::cp_async(to, from, 16, source_bytes, here);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(source_bytes)
               : "memory");
#endif
}
SKVQ_DEVICE void commit_copies(SKVQ_HERE) {
#if defined(SKVQ_SIMT)
  simt::cp_async_commit(here);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
SKVQ_DEVICE void wait_copies() {
#if defined(SKVQ_SIMT)
  simt::cp_async_wait(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// ---- "mbarrier" and "cp.async.bulk", sm_90 ----

#if defined(SKVQ_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define SKVQ_HAS_BULK_COPY 1
#else
#define SKVQ_HAS_BULK_COPY 0
#endif

#if SKVQ_HAS_BULK_COPY
SKVQ_DEVICE void barrier_init(std::uint64_t* barrier, std::uint32_t arrivals SKVQ_AND_HERE) {
#if defined(SKVQ_SIMT)
  simt::mbarrier_init(barrier, arrivals, here);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}
// Makes initialised barriers visible to asynchronous copies.
SKVQ_DEVICE void barrier_init_fence() {
#if !defined(SKVQ_SIMT)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// Ordinary accesses to shared memory come before the asynchronous copies that this thread issues from here on.
SKVQ_DEVICE void proxy_fence() {
#if !defined(SKVQ_SIMT)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Arrives once and announces `bytes` that copies will bring in this phase.
SKVQ_DEVICE void barrier_arrive_expect(std::uint64_t* barrier, std::uint32_t bytes SKVQ_AND_HERE) {
#if defined(SKVQ_SIMT)
  simt::mbarrier_arrive_expect(barrier, bytes, here);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
// Waits until the phase of parity `parity` is complete.
SKVQ_DEVICE void barrier_wait(std::uint64_t* barrier, std::uint32_t parity SKVQ_AND_HERE) {
#if defined(SKVQ_SIMT)
  simt::mbarrier_wait(barrier, parity, here);
#else
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}
// A multiple of 16 bytes from global to shared memory; counts towards `barrier`.
SKVQ_DEVICE void copy_bulk(void* to, const void* from, std::uint32_t bytes, std::uint64_t* barrier SKVQ_AND_HERE) {
#if defined(SKVQ_SIMT)
  simt::cp_async_bulk(to, from, bytes, barrier, here);
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}
#endif

}  // namespace skvq::cuda::ptx

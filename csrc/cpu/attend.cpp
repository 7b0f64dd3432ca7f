#include "cpu/decode_kernel.h"
#include "cpu/kernels.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

AttendKernels attend_kernels() {
  return {attend_item, sizeof(PackedTile)};
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

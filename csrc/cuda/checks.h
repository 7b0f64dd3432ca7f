// What the kernels need from their arguments, checked where a caller can still read the reason.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "core/format_text.h"

namespace skvq::cuda {

inline constexpr int kVectorBytes = 16;  // what a lane loads and stores at once

inline bool is_vector_aligned(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % kVectorBytes == 0;
}

inline void check_aligned(const void* p, const char* name) {
  if (is_vector_aligned(p)) return;
  throw std::invalid_argument(concat(name, " starts ", reinterpret_cast<std::uintptr_t>(p) % kVectorBytes,
                                     " bytes behind a multiple of ", kVectorBytes, ", and the CUDA kernels move ",
                                     kVectorBytes, " bytes at once; give it memory of its own, as torch.empty does"));
}

inline void check_arrangement(const RecordFormat& format) {
  if (format.arrangement == ArrangementKind::kMma) return;
  throw std::invalid_argument(concat("the CUDA kernels keep pages in the arrangement ",
                                     kArrangementNames[static_cast<int>(ArrangementKind::kMma)], ", and these are in ",
                                     kArrangementNames[static_cast<int>(format.arrangement)],
                                     ": make the cache on its CUDA device, or repack the pages"));
}

}  // namespace skvq::cuda

// The kernels that the shared cases run on: the CPU backend, or the CUDA kernels in the emulator of tests/simt.
#pragma once

#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "core/format_text.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"

namespace skvq::test {

// What memory holds that nobody has written: NaN in every format.
inline constexpr std::uint8_t kNothing = 0xff;

#if defined(SKVQ_SIMT)
inline constexpr bool kIsCuda = true;
inline constexpr const char* kArrangement = "mma";
inline constexpr DType kDType = DType::kF16;
inline const std::vector<DType> kDecodeDTypes = {DType::kF16, DType::kBf16};
#else
inline constexpr bool kIsCuda = false;
inline constexpr const char* kArrangement = "lanes";
inline constexpr DType kDType = DType::kF32;
inline const std::vector<DType> kDecodeDTypes = {DType::kF32, DType::kF16, DType::kBf16};
#endif

inline void append(const AppendArgs& args) {
#if defined(SKVQ_SIMT)
  cuda::append(args, nullptr);
#else
  cpu::append(args, cpu::kSerial);
#endif
}

inline void decode_attention(const DecodeArgs& args) {
#if defined(SKVQ_SIMT)
  std::vector<std::uint8_t> workspace(cuda::decode_workspace_bytes(args), kNothing);
  cuda::decode_attention(args, workspace.data(), nullptr);
#else
  cpu::decode_attention(args, cpu::kSerial);
#endif
}

// What decode_attention can read.
struct DecodeFormat {
  std::string k, v;
  int group, head_dim;
};

inline std::vector<DecodeFormat> decode_formats() {
  std::vector<DecodeFormat> formats;
#if defined(SKVQ_SIMT)
  std::istringstream lines(cuda::decode_instances());  // such as "k3:64/128+2-v1.5-g64 at head_dim 128"
  for (std::string line; std::getline(lines, line);) {
    const std::size_t v = line.find("-v"), group = line.find("-g"), dim = line.find(" at head_dim ");
    formats.push_back({line.substr(1, v - 1), line.substr(v + 2, group - v - 2), std::atoi(line.c_str() + group + 2),
                       std::atoi(line.c_str() + dim + 13)});
  }
#else
  for (const int head_dim : kHeadDims) {
    for (const char* format : {"8", "4", "3", "2", "1.5", "1.5fast"}) {
      formats.push_back({format, head_dim % 64 == 0 ? "3:1/4+1.5" : format, 64, head_dim});
    }
  }
#endif
  return formats;
}

}  // namespace skvq::test

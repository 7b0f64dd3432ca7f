// The kernels of one instruction set, and the choice among them at run time.
#pragma once

#include <vector>

#include "cpu/decode_plan.h"
#include "skvq/cache.h"

namespace skvq::cpu {

// csrc/cpu/pack.cpp, compiled once per instruction set, without contraction to fused multiply-adds.
struct PackKernels {
  void (*flush_tile)(const AppendArgs& args, int sequence, int head, int tile);
  void (*store_rows)(const AppendArgs& args, int sequence, int head);
  void (*quantize_rows)(const QuantizeRowsArgs& args, std::int64_t begin, std::int64_t end);
  void (*dequantize_rows)(const QuantizeRowsArgs& args, std::int64_t begin, std::int64_t end);
  void (*map_heads)(const MapHeadsArgs& args, std::int64_t token);
  // One side of a record as fp32 [64 tokens, head_dim].
  void (*dequantize_record)(const RecordFormat& format, Side side, Exponents exponents, const std::uint8_t* record,
                            float* out);
  void (*repack_record)(const RecordFormat& format, ArrangementKind target, const std::uint8_t* from, std::uint8_t* to);
};

// csrc/cpu/attend.cpp, compiled once per instruction set.
struct AttendKernels {
  void (*attend_item)(const DecodeArgs& args, const WorkItem& item, const Scratch& scratch);
  std::int64_t tile_bytes;  // size of Scratch::tile
};

struct Kernels {
  const char* isa;
  PackKernels pack;
  AttendKernels attend;
};

// All sets of this build that this CPU runs, best first.
std::vector<Kernels> supported_kernels();

// The best set this CPU runs, or the one named by the environment variable SKVQ_CPU_ISA.
// Throws std::runtime_error where that names a set that is unknown, not built or not supported by the CPU.
const Kernels& kernels();

// Comma-separated names of the sets in this build.
const char* built_isas();

}  // namespace skvq::cpu

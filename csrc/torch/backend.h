// Who computes: the kernels of one kind of device behind one table, so that schemas, checks and argument structs are
// written once.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "skvq/cache.h"

namespace skvq::ops {

struct Backend;

// Where the tensors of a call are: on the device of its first one.
struct Place {
  const Backend* backend;
  bool on_cpu;         // the contents of a tensor can be looked at without waiting for a device
  std::int32_t index;  // of the GPU
};

struct Backend {
  ArrangementKind arrangement;  // the one its attention is made for
  int alignment;                // bytes to which pages, sinks, ring and queries must be aligned

  void (*append)(const AppendArgs& args, const Place& place);
  // Throws std::invalid_argument where there is no kernel for the format and dtype.
  void (*check_decode_format)(const RecordFormat& format, DType q_dtype, DType cache_dtype);
  // Throws what check_decode_format throws, too.
  std::size_t (*decode_workspace_bytes)(const DecodeArgs& args, const Place& place);
  // `workspace`: decode_workspace_bytes bytes, null where that is 0.
  void (*decode_attention)(const DecodeArgs& args, void* workspace, const Place& place);
  void (*map_heads)(const MapHeadsArgs& args, const Place& place);
  void (*permute_channels)(const PermuteArgs& args, const Place& place);
  void (*quantize_rows)(const QuantizeRowsArgs& args, const Place& place);
  void (*dequantize_rows)(const QuantizeRowsArgs& args, const Place& place);
  void (*merge_states)(const MergeArgs& args, const Place& place);
  void (*copy_pages)(const CopyPagesArgs& args, const Place& place);
  void (*unpack_pages)(const UnpackPagesArgs& args, const Place& place);
};

// cpu_backend.cpp; in a build for the emulator cuda_backend.cpp.
const Backend& cpu_backend();
// cuda_backend.cpp or no_cuda_backend.cpp, which throws std::runtime_error with what to do about it.
const Backend& cuda_backend();

// What build_info says of the CUDA kernels, as JSON: null, or architectures and decode kernels.
std::string cuda_json();

}  // namespace skvq::ops

// The CUDA backend: one function per operation, on device pointers and a stream. Arguments are checked by the caller
// (csrc/torch/checks.h); what is not built, and every failure of the runtime, is an exception. No header of the
// toolkit.
#pragma once

#include <cstddef>
#include <string>

#include "skvq/cache.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace skvq::cuda {

using Stream = CUstream_st*;

// Packs complete tiles, stores the new rows, advances kv_len.
void append(const AppendArgs& args, Stream stream);

// `workspace`: decode_workspace_bytes(args) bytes, aligned to 16. Launches depend on shapes only. Throws
// std::invalid_argument where no kernel was built for the format, and says which were.
std::size_t decode_workspace_bytes(const DecodeArgs& args);
void decode_attention(const DecodeArgs& args, void* workspace, Stream stream);
// Throws what decode_attention would throw for this format and dtype.
void check_decode_format(const RecordFormat& format, DType q_dtype, DType cache_dtype);

void map_heads(const MapHeadsArgs& args, Stream stream);
void permute_channels(const PermuteArgs& args, Stream stream);
void quantize_rows(const QuantizeRowsArgs& args, Stream stream);
void dequantize_rows(const QuantizeRowsArgs& args, Stream stream);
void merge_states(const MergeArgs& args, Stream stream);
void copy_pages(const CopyPagesArgs& args, Stream stream);
void unpack_pages(const UnpackPagesArgs& args, Stream stream);

// What was built: schemes with a decode kernel, one a line, and the architectures in the binary.
std::string decode_instances();

// Throws std::runtime_error where the binary has no kernels for the current device: what was built, what the GPU is,
// how to rebuild.
void check_device();

}  // namespace skvq::cuda

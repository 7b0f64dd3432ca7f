// Checks of what comes from Python, and tensors as the argument structs of the backends. A failed check throws
// std::invalid_argument (ValueError in Python) before anything is written.
//
// Shapes, dtypes, devices and addresses are checked everywhere. Contents (lengths, page ids, ratios) are checked on the
// CPU only: to look at them on a GPU would make the host wait for it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "core/format_text.h"
#include "torch/backend.h"

#define SKVQ_CHECK(condition, ...)                                              \
  do {                                                                          \
    if (!(condition)) throw std::invalid_argument(::skvq::concat(__VA_ARGS__)); \
  } while (false)

namespace skvq::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An uninitialized tensor where `like` is, contiguous. One call of the C interface: torch::stable::new_empty looks its
// operator up by name and boxes every argument, which takes longer than small kernels do.
Tensor new_tensor(const Tensor& like, const std::int64_t* shape, std::int64_t* strides, int dims, ScalarType dtype);
template <std::size_t N>
Tensor new_tensor(const Tensor& like, const std::int64_t (&shape)[N], ScalarType dtype) {
  std::int64_t strides[N];
  return new_tensor(like, shape, strides, N, dtype);
}

std::string shape_of(const Tensor& t);
DType dtype_of(ScalarType type, const char* name);
DType float_dtype(const Tensor& t, const char* name);

// The device of a call's first tensor. Throws std::runtime_error where this build has no kernels for it.
Place place_of(const Tensor& t, const char* name);

// `name` is what a message calls the tensor; -1 in `shape` stands for any size.
void check_shape(const Tensor& t, const char* name, std::initializer_list<std::int64_t> shape);
void check_contiguous(const Tensor& t, const char* name, const Place& place);
void check_tensor(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<std::int64_t> shape,
                  const Place& place);
// Clip ratios [*shape] or [*shape, choices].
ClipTable clip_table(const Tensor& clip, const char* name, std::initializer_list<std::int64_t> shape,
                     const Place& place);
// The address of pages or rows, for kernels that load many bytes at once.
void check_alignment(const Tensor& t, const char* name, const Place& place);

// The tensors that make up a cache, as they stand in the op schemas.
struct CacheTensors {
  const Tensor &pages, &page_table, &sink_k, &sink_v, &ring_k, &ring_v, &kv_len, &exponents;
};
struct FormatText {
  const std::string &k, &v;
  std::int64_t group;
  const std::string &meta, &arrangement;
};
RecordFormat parse(const FormatText& text, std::int64_t head_dim);
CacheView make_cache_view(const CacheTensors& t, const FormatText& format, std::int64_t window, const Place& place);

// Rows [num_tokens, num_heads, head_dim]; any strides for tokens and heads.
RowsView make_rows(const Tensor& t, const char* name, const Place& place);
// The same for kernels that load many bytes at once.
RowsView make_aligned_rows(const Tensor& t, const char* name, const Place& place);
Ragged make_ragged(const OptionalTensor& cu_seqlens, const char* name, std::int64_t num_tokens, int batch,
                   const Place& place);

}  // namespace skvq::ops

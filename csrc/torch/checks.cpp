#include "torch/checks.h"

#include <algorithm>

#include "core/window.h"

namespace skvq::ops {
namespace {

const char* dtype_name(const Tensor& t) {
  return torch::headeronly::toString(t.scalar_type());
}

std::string device_text(bool on_cpu, std::int32_t index) {
  return on_cpu ? "cpu" : concat("cuda:", index);
}

void check_place(const Tensor& t, const char* name, const Place& place) {
  const bool on_cpu = t.is_cpu();
  const std::int32_t index = on_cpu ? 0 : t.get_device_index();
  SKVQ_CHECK(on_cpu == place.on_cpu && index == place.index, name, " is on ", device_text(on_cpu, index),
             " and the other tensors of this call on ", device_text(place.on_cpu, place.index),
             "; move all of them to one device");
}

std::string shape_text(std::initializer_list<std::int64_t> shape) {
  std::string text;
  for (const std::int64_t n : shape)
    text += (text.empty() ? "" : ", ") + (n < 0 ? std::string("any") : std::to_string(n));
  return "[" + text + "]";
}

void check_exponents(const std::int32_t* exponents, std::int64_t heads) {
  for (std::int64_t i = 0; i < heads * 4; ++i) {
    SKVQ_CHECK(exponents[i] >= -32 && exponents[i] <= 32, "exponents of head ", i / 4, " hold ", exponents[i],
               "; allowed is -32 to 32");
  }
}

}  // namespace

Tensor new_tensor(const Tensor& like, const std::int64_t* shape, std::int64_t* strides, int dims, ScalarType dtype) {
  std::int64_t stride = 1;
  for (int i = dims; i-- > 0; stride *= std::max<std::int64_t>(1, shape[i])) strides[i] = stride;
  std::int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto type = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape, strides, type, device_type, device_index, &made));
  return Tensor(made);
}

std::string shape_of(const Tensor& t) {
  std::string text;
  for (const std::int64_t n : t.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}

DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::Half:
      return DType::kF16;
    case ScalarType::BFloat16:
      return DType::kBf16;
    default:
      throw std::invalid_argument(
          concat(name, " has dtype ", torch::headeronly::toString(type), "; use float32, float16 or bfloat16"));
  }
}

DType float_dtype(const Tensor& t, const char* name) {
  return dtype_of(t.scalar_type(), name);
}

Place place_of(const Tensor& t, const char* name) {
  if (t.is_cpu()) return {&cpu_backend(), true, 0};
  SKVQ_CHECK(t.is_cuda(), name, " is on a device that skvq_ext has no kernels for; use the CPU or CUDA");
  return {&cuda_backend(), false, t.get_device_index()};
}

void check_shape(const Tensor& t, const char* name, std::initializer_list<std::int64_t> shape) {
  bool same = t.dim() == static_cast<std::int64_t>(shape.size());
  std::int64_t i = 0;
  for (const std::int64_t n : shape) {
    same = same && (n < 0 || t.size(i) == n);
    ++i;
  }
  SKVQ_CHECK(same, name, " has shape ", shape_of(t), "; expected ", shape_text(shape));
}

void check_contiguous(const Tensor& t, const char* name, const Place& place) {
  check_place(t, name, place);
  SKVQ_CHECK(t.is_contiguous(), name, " is not contiguous; call .contiguous() on it");
}

void check_tensor(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<std::int64_t> shape,
                  const Place& place) {
  check_shape(t, name, shape);
  SKVQ_CHECK(t.scalar_type() == dtype, name, " has dtype ", dtype_name(t), "; expected ",
             torch::headeronly::toString(dtype));
  check_contiguous(t, name, place);
}

ClipTable clip_table(const Tensor& clip, const char* name, std::initializer_list<std::int64_t> shape,
                     const Place& place) {
  constexpr std::int64_t kMaxChoices = 8;
  const std::int64_t dims = static_cast<std::int64_t>(shape.size());
  const std::int64_t choices = clip.dim() == dims + 1 ? clip.size(dims) : 1;
  bool same = clip.dim() == dims || clip.dim() == dims + 1;
  for (std::int64_t i = 0; i < dims; ++i) same = same && clip.size(i) == shape.begin()[i];
  SKVQ_CHECK(same && choices >= 1 && choices <= kMaxChoices, name, " has shape ", shape_of(clip), "; expected ",
             shape_text(shape), ", or a last dimension more of up to ", kMaxChoices,
             " ratios that every token takes the best of");
  SKVQ_CHECK(clip.scalar_type() == ScalarType::Float, name, " has dtype ", dtype_name(clip), "; expected ",
             torch::headeronly::toString(ScalarType::Float));
  check_contiguous(clip, name, place);
  const float* data = clip.const_data_ptr<float>();
  for (std::int64_t i = 0; place.on_cpu && i < clip.numel(); ++i) {
    SKVQ_CHECK(data[i] > 0.0f && data[i] <= 1.0f, name, " holds ", data[i], "; a clip ratio is above 0 and at most 1");
  }
  return {data, static_cast<int>(choices)};
}

void check_alignment(const Tensor& t, const char* name, const Place& place) {
  const int alignment = place.backend->alignment;
  const auto address = reinterpret_cast<std::uintptr_t>(t.const_data_ptr());
  SKVQ_CHECK(address % alignment == 0, name, " starts ", address % alignment, " bytes behind a multiple of ", alignment,
             ", and the CUDA kernels load ", alignment, " bytes at once; call .clone() on it");
}

RecordFormat parse(const FormatText& text, std::int64_t head_dim) {
  return parse_record_format(text.k, text.v, static_cast<int>(text.group), text.meta, text.arrangement,
                             static_cast<int>(head_dim));
}

CacheView make_cache_view(const CacheTensors& t, const FormatText& text, std::int64_t window, const Place& place) {
  SKVQ_CHECK(t.ring_k.dim() == 4, "ring_k has shape ", shape_of(t.ring_k),
             "; expected [batch, ring slots, num_kv_heads, head_dim]");
  const std::int64_t batch = t.ring_k.size(0), slots = t.ring_k.size(1), heads = t.ring_k.size(2),
                     head_dim = t.ring_k.size(3);
  const RecordFormat format = parse(text, head_dim);
  const DType dtype = float_dtype(t.ring_k, "ring_k");
  const ScalarType scalar = t.ring_k.scalar_type();
  SKVQ_CHECK(window >= 1, "window is ", window, "; at least 1 token (the query's own) must stay in full precision");
  SKVQ_CHECK(slots >= ring_slots(static_cast<int>(window), 0), "ring_k has ", slots, " slots; a window of ", window,
             " tokens needs at least ", ring_slots(static_cast<int>(window), 0), " (window + ", kTileTokens,
             " + rollback)");
  check_tensor(t.ring_k, "ring_k", scalar, {batch, slots, heads, head_dim}, place);
  check_tensor(t.ring_v, "ring_v", scalar, {batch, slots, heads, head_dim}, place);
  check_tensor(t.sink_k, "sink_k", scalar, {batch, -1, heads, head_dim}, place);
  check_tensor(t.sink_v, "sink_v", scalar, {batch, t.sink_k.size(1), heads, head_dim}, place);
  check_tensor(t.pages, "pages", ScalarType::Byte, {-1, heads, format.record_bytes()}, place);
  check_tensor(t.page_table, "page_table", ScalarType::Int, {batch, -1}, place);
  check_tensor(t.kv_len, "kv_len", ScalarType::Int, {batch}, place);
  check_tensor(t.exponents, "exponents", ScalarType::Int, {heads, 4}, place);
  check_alignment(t.pages, "pages", place);
  check_alignment(t.sink_k, "sink_k", place);
  check_alignment(t.sink_v, "sink_v", place);
  check_alignment(t.ring_k, "ring_k", place);
  check_alignment(t.ring_v, "ring_v", place);
  const std::int32_t* exponents = t.exponents.const_data_ptr<std::int32_t>();
  if (place.on_cpu) check_exponents(exponents, heads);
  return {static_cast<std::uint8_t*>(t.pages.mutable_data_ptr()),
          t.page_table.const_data_ptr<std::int32_t>(),
          t.sink_k.mutable_data_ptr(),
          t.sink_v.mutable_data_ptr(),
          t.ring_k.mutable_data_ptr(),
          t.ring_v.mutable_data_ptr(),
          static_cast<std::int32_t*>(t.kv_len.mutable_data_ptr()),
          exponents,
          t.pages.size(0),
          static_cast<int>(batch),
          static_cast<int>(heads),
          static_cast<int>(head_dim),
          static_cast<int>(t.page_table.size(1)),
          static_cast<int>(t.sink_k.size(1)),
          static_cast<int>(slots),
          static_cast<int>(window),
          dtype,
          format};
}

RowsView make_rows(const Tensor& t, const char* name, const Place& place) {
  check_place(t, name, place);
  SKVQ_CHECK(t.stride(2) == 1 || t.size(2) <= 1, name, " has stride ", t.stride(2),
             " in its last dimension; channels must be adjacent: call .contiguous() on it");
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

RowsView make_aligned_rows(const Tensor& t, const char* name, const Place& place) {
  const RowsView rows = make_rows(t, name, place);
  check_alignment(t, name, place);
  const int bytes = dtype_bytes(float_dtype(t, name)), alignment = place.backend->alignment;
  const std::int64_t strides[] = {rows.token_stride, rows.head_stride};
  for (int i = 0; i < 2; ++i) {
    SKVQ_CHECK(t.size(i) <= 1 || strides[i] * bytes % alignment == 0, name, " has stride ", strides[i],
               " in dimension ", i, ", and the CUDA kernels load ", alignment / bytes,
               " channels at once; call .contiguous() on it");
  }
  return rows;
}

Ragged make_ragged(const OptionalTensor& cu_seqlens, const char* name, std::int64_t num_tokens, int batch,
                   const Place& place) {
  if (!cu_seqlens) {
    SKVQ_CHECK(batch == 0 || num_tokens % batch == 0, "without ", name, " all ", batch,
               " sequences have equal lengths, but ", num_tokens, " tokens do not divide by that; pass ", name);
    return {nullptr, num_tokens, batch};
  }
  check_tensor(*cu_seqlens, name, ScalarType::Int, {batch + 1}, place);
  const std::int32_t* starts = cu_seqlens->const_data_ptr<std::int32_t>();
  if (!place.on_cpu) return {starts, num_tokens, batch};
  for (int b = 0; b < batch; ++b) {
    SKVQ_CHECK(starts[b + 1] >= starts[b], name, " decreases from ", starts[b], " to ", starts[b + 1], " at sequence ",
               b);
  }
  SKVQ_CHECK(starts[0] == 0 && starts[batch] == num_tokens, name, " runs from ", starts[0], " to ", starts[batch],
             "; expected 0 to ", num_tokens, ", the number of tokens given");
  return {starts, num_tokens, batch};
}

}  // namespace skvq::ops

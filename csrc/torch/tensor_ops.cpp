// Ops on plain tensors and pages, on the CPU.
#include "torch/tensor_ops.h"

#include <cstring>
#include <vector>

#include "cpu/cpu.h"

namespace skvq::ops {
namespace {

Exponents check_exponents(std::int64_t scale, std::int64_t zero) {
  SKVQ_CHECK(scale >= -32 && scale <= 32 && zero >= -32 && zero <= 32, "scale_exponent and zero_exponent are ", scale,
             " and ", zero, "; allowed is -32 to 32");
  return {static_cast<int>(scale), static_cast<int>(zero)};
}

// Groups [group_start[i], group_start[i + 1]) must tile the channels; returns the bytes of a row.
int check_groups(const Tensor& group_start, std::int64_t channels, Code code) {
  SKVQ_CHECK(group_start.dim() == 1 && group_start.size(0) >= 2, "group_start has shape ", shape_of(group_start),
             "; expected [groups + 1] with at least one group");
  check_tensor(group_start, "group_start", ScalarType::Int, {group_start.size(0)});
  const std::int32_t* start = group_start.const_data_ptr<std::int32_t>();
  const std::int64_t groups = group_start.size(0) - 1;
  int bytes = 0;
  for (std::int64_t g = 0; g < groups; ++g) {
    SKVQ_CHECK(start[g + 1] > start[g], "group ", g, " runs from channel ", start[g], " to ", start[g + 1],
               "; a group needs at least one channel");
    bytes += group_row_bytes(code, start[g + 1] - start[g]);
  }
  SKVQ_CHECK(start[0] == 0 && (channels < 0 || start[groups] == channels), "group_start runs from ", start[0], " to ",
             start[groups], "; expected 0 to ", channels, ", the number of channels");
  return bytes;
}

void check_page_ids(const Tensor& ids, const char* name, std::int64_t num_pages) {
  SKVQ_CHECK(ids.dim() == 1, name, " has shape ", shape_of(ids), "; expected one dimension");
  check_tensor(ids, name, ScalarType::Int, {ids.size(0)});
  const std::int32_t* data = ids.const_data_ptr<std::int32_t>();
  for (std::int64_t i = 0; i < ids.size(0); ++i) {
    SKVQ_CHECK(data[i] >= 0 && data[i] < num_pages, name, "[", i, "] is ", data[i], "; pages are 0 to ", num_pages - 1);
  }
}

template <class T>
void gather_channels(const T* x, const std::int32_t* permutation, T* out, std::int64_t rows, std::int64_t heads,
                     std::int64_t dim) {
  cpu::for_each(torch_threads(), rows, [&](std::int64_t row) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t base = (row * heads + h) * dim;
      for (std::int64_t c = 0; c < dim; ++c) out[base + c] = x[base + permutation[h * dim + c]];
    }
  });
}

}  // namespace

Tensor permute_channels(const Tensor& x, const Tensor& permutation) {
  SKVQ_CHECK(x.dim() >= 2, "x has shape ", shape_of(x), "; expected [..., heads, head_dim]");
  const std::int64_t heads = x.size(x.dim() - 2), dim = x.size(x.dim() - 1);
  const DType dtype = float_dtype(x, "x");
  check_cpu_contiguous(x, "x");
  check_tensor(permutation, "permutation", ScalarType::Int, {heads, dim});
  const std::int32_t* p = permutation.const_data_ptr<std::int32_t>();
  for (std::int64_t h = 0; h < heads; ++h) {
    std::vector<bool> seen(dim, false);
    for (std::int64_t c = 0; c < dim; ++c) {
      const std::int32_t from = p[h * dim + c];
      SKVQ_CHECK(from >= 0 && from < dim && !seen[from], "permutation of head ", h, " holds ", from, " at ", c,
                 "; each channel of 0 to ", dim - 1, " must occur once");
      seen[from] = true;
    }
  }
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const std::int64_t rows = heads * dim == 0 ? 0 : x.numel() / (heads * dim);
  if (dtype == DType::kF32) {
    gather_channels(x.const_data_ptr<float>(), p, static_cast<float*>(out.mutable_data_ptr()), rows, heads, dim);
  } else {
    gather_channels(static_cast<const std::uint16_t*>(x.const_data_ptr()), p,
                    static_cast<std::uint16_t*>(out.mutable_data_ptr()), rows, heads, dim);
  }
  return out;
}

std::tuple<Tensor, Tensor> quantize_pack(const Tensor& x, const Tensor& group_start, const OptionalTensor& clip,
                                         const std::string& code, const std::string& meta, std::int64_t scale_exponent,
                                         std::int64_t zero_exponent) {
  QuantizeRowsArgs a{};
  SKVQ_CHECK(x.dim() == 2, "x has shape ", shape_of(x), "; expected [tokens, channels]");
  a.dtype = float_dtype(x, "x");
  check_cpu_contiguous(x, "x");
  a.code = parse_code(code);
  a.meta_type = parse_meta(meta);
  a.exponents = check_exponents(scale_exponent, zero_exponent);
  a.row_bytes = check_groups(group_start, x.size(1), a.code);
  a.num_rows = x.size(0);
  a.num_channels = static_cast<int>(x.size(1));
  a.num_groups = static_cast<int>(group_start.size(0) - 1);
  if (clip) {
    check_tensor(*clip, "clip", ScalarType::Float, {a.num_groups});
    a.clip = clip->const_data_ptr<float>();
    for (int g = 0; g < a.num_groups; ++g) {
      SKVQ_CHECK(a.clip[g] > 0.0f && a.clip[g] <= 1.0f, "clip of group ", g, " is ", a.clip[g],
                 "; a clip ratio is above 0 and at most 1");
    }
  }
  Tensor codes = torch::stable::new_empty(x, {a.num_rows, a.row_bytes}, ScalarType::Byte);
  Tensor metas = torch::stable::new_empty(x, {a.num_rows, a.num_groups, 2},
                                          a.meta_type == Meta::kE4m3 ? ScalarType::Float8_e4m3fn : ScalarType::Half);
  a.x = x.const_data_ptr();
  a.group_start = group_start.const_data_ptr<std::int32_t>();
  a.codes = static_cast<std::uint8_t*>(codes.mutable_data_ptr());
  a.meta = metas.mutable_data_ptr();
  cpu::quantize_rows(a, torch_threads());
  return {codes, metas};
}

Tensor dequantize_unpack(const Tensor& codes, const Tensor& meta, const Tensor& group_start, const std::string& code,
                         std::int64_t scale_exponent, std::int64_t zero_exponent) {
  QuantizeRowsArgs a{};
  a.code = parse_code(code);
  SKVQ_CHECK(meta.scalar_type() == ScalarType::Float8_e4m3fn || meta.scalar_type() == ScalarType::Half,
             "meta has dtype ", torch::headeronly::toString(meta.scalar_type()),
             "; expected float8_e4m3fn or float16, as quantize_pack returns it");
  a.meta_type = meta.scalar_type() == ScalarType::Half ? Meta::kFp16 : Meta::kE4m3;
  a.exponents = check_exponents(scale_exponent, zero_exponent);
  a.row_bytes = check_groups(group_start, -1, a.code);
  a.num_groups = static_cast<int>(group_start.size(0) - 1);
  a.group_start = group_start.const_data_ptr<std::int32_t>();
  a.num_channels = a.group_start[a.num_groups];
  check_tensor(codes, "codes", ScalarType::Byte, {-1, a.row_bytes});
  a.num_rows = codes.size(0);
  check_tensor(meta, "meta", meta.scalar_type(), {a.num_rows, a.num_groups, 2});
  Tensor out = torch::stable::new_empty(codes, {a.num_rows, a.num_channels}, ScalarType::Float);
  a.codes = const_cast<std::uint8_t*>(static_cast<const std::uint8_t*>(codes.const_data_ptr()));
  a.meta = const_cast<void*>(meta.const_data_ptr());
  a.decoded = static_cast<float*>(out.mutable_data_ptr());
  cpu::dequantize_rows(a, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                        const Tensor& lse_b) {
  SKVQ_CHECK(out_a.dim() == 3, "out_a has shape ", shape_of(out_a), "; expected [num_tokens, num_heads, head_dim]");
  MergeArgs a{};
  const std::int64_t tokens = out_a.size(0), heads = out_a.size(1), dim = out_a.size(2);
  a.dtype = float_dtype(out_a, "out_a");
  check_tensor(out_a, "out_a", out_a.scalar_type(), {tokens, heads, dim});
  check_tensor(out_b, "out_b", out_a.scalar_type(), {tokens, heads, dim});
  check_tensor(lse_a, "lse_a", ScalarType::Float, {tokens, heads});
  check_tensor(lse_b, "lse_b", ScalarType::Float, {tokens, heads});
  Tensor out = torch::stable::new_empty(out_a, {tokens, heads, dim});
  Tensor lse = torch::stable::new_empty(lse_a, {tokens, heads});
  a.out_a = out_a.const_data_ptr();
  a.out_b = out_b.const_data_ptr();
  a.lse_a = lse_a.const_data_ptr<float>();
  a.lse_b = lse_b.const_data_ptr<float>();
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.rows = tokens * heads;
  a.head_dim = static_cast<int>(dim);
  cpu::merge_states(a, torch_threads());
  return {out, lse};
}

void copy_pages(Tensor pages, const Tensor& source_ids, const Tensor& target_ids) {
  SKVQ_CHECK(pages.dim() == 3, "pages has shape ", shape_of(pages),
             "; expected [num_pages, num_kv_heads, record_bytes]");
  check_tensor(pages, "pages", ScalarType::Byte, {-1, pages.size(1), pages.size(2)});
  check_page_ids(source_ids, "source_ids", pages.size(0));
  check_page_ids(target_ids, "target_ids", pages.size(0));
  SKVQ_CHECK(source_ids.size(0) == target_ids.size(0), "source_ids and target_ids have ", source_ids.size(0), " and ",
             target_ids.size(0), " entries; expected as many");
  std::vector<char> is_target(pages.size(0), 0);
  const std::int32_t *source = source_ids.const_data_ptr<std::int32_t>(),
                     *target = target_ids.const_data_ptr<std::int32_t>();
  const std::int64_t count = source_ids.size(0);
  for (std::int64_t i = 0; i < count; ++i) {
    SKVQ_CHECK(!is_target[target[i]], "target_ids names page ", target[i], " twice");
    is_target[target[i]] = 1;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    SKVQ_CHECK(!is_target[source[i]], "page ", source[i],
               " is both source and target; the result would depend on the order");
  }
  const std::int64_t bytes = pages.size(1) * pages.size(2);
  auto* data = static_cast<std::uint8_t*>(pages.mutable_data_ptr());
  cpu::for_each(torch_threads(), count,
                [&](std::int64_t i) { std::memcpy(data + target[i] * bytes, data + source[i] * bytes, bytes); });
}

std::tuple<Tensor, Tensor> unpack_pages(const Tensor& pages, const Tensor& page_ids, const Tensor& exponents,
                                        const std::string& k_format, const std::string& v_format, std::int64_t group,
                                        const std::string& meta, const std::string& arrangement,
                                        std::int64_t head_dim) {
  UnpackPagesArgs a{};
  a.format =
      parse_record_format(k_format, v_format, static_cast<int>(group), meta, arrangement, static_cast<int>(head_dim));
  SKVQ_CHECK(pages.dim() == 3, "pages has shape ", shape_of(pages),
             "; expected [num_pages, num_kv_heads, record_bytes]");
  check_tensor(pages, "pages", ScalarType::Byte, {-1, pages.size(1), a.format.record_bytes()});
  check_page_ids(page_ids, "page_ids", pages.size(0));
  check_tensor(exponents, "exponents", ScalarType::Int, {pages.size(1), 4});
  a.num_pages = static_cast<int>(page_ids.size(0));
  a.num_kv_heads = static_cast<int>(pages.size(1));
  Tensor k =
      torch::stable::new_empty(pages, {page_ids.size(0), pages.size(1), kTileTokens, head_dim}, ScalarType::Float);
  Tensor v =
      torch::stable::new_empty(pages, {page_ids.size(0), pages.size(1), kTileTokens, head_dim}, ScalarType::Float);
  a.pages = static_cast<const std::uint8_t*>(pages.const_data_ptr());
  a.page_ids = page_ids.const_data_ptr<std::int32_t>();
  a.exponents = exponents.const_data_ptr<std::int32_t>();
  a.k = static_cast<float*>(k.mutable_data_ptr());
  a.v = static_cast<float*>(v.mutable_data_ptr());
  cpu::unpack_pages(a, torch_threads());
  return {k, v};
}

}  // namespace skvq::ops

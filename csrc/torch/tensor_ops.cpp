// Ops on plain tensors.
#include "torch/tensor_ops.h"

#include <vector>

#include "core/quantize.h"

namespace skvq::ops {
namespace {

Exponents check_exponents(std::int64_t scale, std::int64_t zero) {
  SKVQ_CHECK(scale >= -32 && scale <= 32 && zero >= -32 && zero <= 32, "scale_exponent and zero_exponent are ", scale,
             " and ", zero, "; allowed is -32 to 32");
  return {static_cast<int>(scale), static_cast<int>(zero)};
}

// Groups [group_start[i], group_start[i + 1]) must tile the channels; returns the bytes of a row.
int check_groups(const Tensor& group_start, std::int64_t channels, Code code) {
  SKVQ_CHECK(group_start.is_cpu(),
             "group_start is on a GPU; it decides the sizes of what is returned, so it must be on "
             "the CPU: call .cpu() on it");
  SKVQ_CHECK(group_start.dim() == 1 && group_start.size(0) >= 2, "group_start has shape ", shape_of(group_start),
             "; expected [groups + 1] with at least one group");
  check_tensor(group_start, "group_start", ScalarType::Int, {group_start.size(0)},
               place_of(group_start, "group_start"));
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

// Errors of one group are counted in 32 bits.
void check_searched(const Tensor& group_start) {
  const std::int32_t* start = group_start.const_data_ptr<std::int32_t>();
  for (std::int64_t g = 0; g + 1 < group_start.size(0); ++g) {
    const int channels = start[g + 1] - start[g];
    SKVQ_CHECK(channels <= kMaxSearchedChannels, "group ", g, " has ", channels,
               " channels; several clip ratios need groups of at most ", kMaxSearchedChannels);
  }
}

// The checked group starts where the kernels of `x` can read them.
Tensor groups_near(const Tensor& group_start, const Tensor& x, const Place& place) {
  return place.on_cpu ? group_start : torch::stable::to(group_start, x.device());
}

void check_permutation(const std::int32_t* permutation, std::int64_t heads, std::int64_t dim) {
  for (std::int64_t h = 0; h < heads; ++h) {
    std::vector<bool> seen(dim, false);
    for (std::int64_t c = 0; c < dim; ++c) {
      const std::int32_t from = permutation[h * dim + c];
      SKVQ_CHECK(from >= 0 && from < dim && !seen[from], "permutation of head ", h, " holds ", from, " at ", c,
                 "; each channel of 0 to ", dim - 1, " must occur once");
      seen[from] = true;
    }
  }
}

}  // namespace

Tensor permute_channels(const Tensor& x, const Tensor& permutation) {
  const Place place = place_of(x, "x");
  SKVQ_CHECK(x.dim() >= 2, "x has shape ", shape_of(x), "; expected [..., heads, head_dim]");
  const std::int64_t heads = x.size(x.dim() - 2), dim = x.size(x.dim() - 1);
  PermuteArgs a{};
  a.element_bytes = dtype_bytes(float_dtype(x, "x"));
  check_contiguous(x, "x", place);
  check_tensor(permutation, "permutation", ScalarType::Int, {heads, dim}, place);
  a.permutation = permutation.const_data_ptr<std::int32_t>();
  if (place.on_cpu) check_permutation(a.permutation, heads, dim);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  a.num_rows = heads * dim == 0 ? 0 : x.numel() / (heads * dim);
  a.num_heads = static_cast<int>(heads);
  a.head_dim = static_cast<int>(dim);
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  place.backend->permute_channels(a, place);
  return out;
}

std::tuple<Tensor, Tensor> quantize_pack(const Tensor& x, const Tensor& group_start, const OptionalTensor& clip,
                                         const std::string& code, const std::string& meta, std::int64_t scale_exponent,
                                         std::int64_t zero_exponent) {
  const Place place = place_of(x, "x");
  QuantizeRowsArgs a{};
  SKVQ_CHECK(x.dim() == 2, "x has shape ", shape_of(x), "; expected [tokens, channels]");
  a.dtype = float_dtype(x, "x");
  check_contiguous(x, "x", place);
  a.code = parse_code(code);
  a.meta_type = parse_meta(meta);
  a.exponents = check_exponents(scale_exponent, zero_exponent);
  a.row_bytes = check_groups(group_start, x.size(1), a.code);
  a.num_rows = x.size(0);
  a.num_channels = static_cast<int>(x.size(1));
  a.num_groups = static_cast<int>(group_start.size(0) - 1);
  if (clip) {
    a.clip = clip_table(*clip, "clip", {a.num_groups}, place);
    if (a.clip.choices > 1) check_searched(group_start);
  }
  Tensor codes = new_tensor(x, {a.num_rows, a.row_bytes}, ScalarType::Byte);
  Tensor metas = new_tensor(x, {a.num_rows, a.num_groups, 2},
                            a.meta_type == Meta::kE4m3 ? ScalarType::Float8_e4m3fn : ScalarType::Half);
  const Tensor starts = groups_near(group_start, x, place);
  a.x = x.const_data_ptr();
  a.group_start = starts.const_data_ptr<std::int32_t>();
  a.codes = static_cast<std::uint8_t*>(codes.mutable_data_ptr());
  a.meta = metas.mutable_data_ptr();
  place.backend->quantize_rows(a, place);
  return {codes, metas};
}

Tensor dequantize_unpack(const Tensor& codes, const Tensor& meta, const Tensor& group_start, const std::string& code,
                         std::int64_t scale_exponent, std::int64_t zero_exponent) {
  const Place place = place_of(codes, "codes");
  QuantizeRowsArgs a{};
  a.code = parse_code(code);
  SKVQ_CHECK(meta.scalar_type() == ScalarType::Float8_e4m3fn || meta.scalar_type() == ScalarType::Half,
             "meta has dtype ", torch::headeronly::toString(meta.scalar_type()),
             "; expected float8_e4m3fn or float16, as quantize_pack returns it");
  a.meta_type = meta.scalar_type() == ScalarType::Half ? Meta::kFp16 : Meta::kE4m3;
  a.exponents = check_exponents(scale_exponent, zero_exponent);
  a.row_bytes = check_groups(group_start, -1, a.code);
  a.num_groups = static_cast<int>(group_start.size(0) - 1);
  a.num_channels = group_start.const_data_ptr<std::int32_t>()[a.num_groups];
  check_tensor(codes, "codes", ScalarType::Byte, {-1, a.row_bytes}, place);
  a.num_rows = codes.size(0);
  check_tensor(meta, "meta", meta.scalar_type(), {a.num_rows, a.num_groups, 2}, place);
  Tensor out = new_tensor(codes, {a.num_rows, a.num_channels}, ScalarType::Float);
  const Tensor starts = groups_near(group_start, codes, place);
  a.group_start = starts.const_data_ptr<std::int32_t>();
  a.codes = const_cast<std::uint8_t*>(static_cast<const std::uint8_t*>(codes.const_data_ptr()));
  a.meta = const_cast<void*>(meta.const_data_ptr());
  a.decoded = static_cast<float*>(out.mutable_data_ptr());
  place.backend->dequantize_rows(a, place);
  return out;
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                        const Tensor& lse_b) {
  const Place place = place_of(out_a, "out_a");
  SKVQ_CHECK(out_a.dim() == 3, "out_a has shape ", shape_of(out_a), "; expected [num_tokens, num_heads, head_dim]");
  MergeArgs a{};
  const std::int64_t tokens = out_a.size(0), heads = out_a.size(1), dim = out_a.size(2);
  a.dtype = float_dtype(out_a, "out_a");
  check_tensor(out_a, "out_a", out_a.scalar_type(), {tokens, heads, dim}, place);
  check_tensor(out_b, "out_b", out_a.scalar_type(), {tokens, heads, dim}, place);
  check_tensor(lse_a, "lse_a", ScalarType::Float, {tokens, heads}, place);
  check_tensor(lse_b, "lse_b", ScalarType::Float, {tokens, heads}, place);
  Tensor out = new_tensor(out_a, {tokens, heads, dim}, out_a.scalar_type());
  Tensor lse = new_tensor(lse_a, {tokens, heads}, ScalarType::Float);
  a.out_a = out_a.const_data_ptr();
  a.out_b = out_b.const_data_ptr();
  a.lse_a = lse_a.const_data_ptr<float>();
  a.lse_b = lse_b.const_data_ptr<float>();
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.rows = tokens * heads;
  a.head_dim = static_cast<int>(dim);
  place.backend->merge_states(a, place);
  return {out, lse};
}

}  // namespace skvq::ops

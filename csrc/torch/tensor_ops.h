#pragma once

#include <tuple>

#include "torch/checks.h"

namespace skvq::ops {

Tensor permute_channels(const Tensor& x, const Tensor& permutation);

Tensor enter_heads(const Tensor& x, const OptionalTensor& permutation, const OptionalTensor& shift,
                   const OptionalTensor& scale, const OptionalTensor& matrix, std::int64_t num_kv_heads);
Tensor leave_heads(const Tensor& o, const OptionalTensor& permutation, const OptionalTensor& shift,
                   const OptionalTensor& scale, const OptionalTensor& matrix, const OptionalTensor& share,
                   std::int64_t num_kv_heads);

std::tuple<Tensor, Tensor> quantize_pack(const Tensor& x, const Tensor& group_start, const OptionalTensor& clip,
                                         const std::string& code, const std::string& meta, std::int64_t scale_exponent,
                                         std::int64_t zero_exponent);
Tensor dequantize_unpack(const Tensor& codes, const Tensor& meta, const Tensor& group_start, const std::string& code,
                         std::int64_t scale_exponent, std::int64_t zero_exponent);

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                        const Tensor& lse_b);

}  // namespace skvq::ops

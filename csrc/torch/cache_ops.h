#pragma once

#include <tuple>

#include "torch/checks.h"

namespace skvq::ops {

void append(const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens, Tensor pages, const Tensor& page_table,
            Tensor sink_k, Tensor sink_v, Tensor ring_k, Tensor ring_v, Tensor kv_len, const Tensor& k_clip,
            const Tensor& v_clip, const Tensor& exponents, const std::string& k_format, const std::string& v_format,
            std::int64_t group, const std::string& meta, const std::string& arrangement, std::int64_t window);

std::int64_t decode_workspace_bytes(const Tensor& q, const OptionalTensor& cu_seqlens_q, const Tensor& pages,
                                    const Tensor& page_table, const Tensor& sink_k, const Tensor& sink_v,
                                    const Tensor& ring_k, const Tensor& ring_v, const Tensor& kv_len,
                                    const Tensor& exponents, const std::string& k_format, const std::string& v_format,
                                    std::int64_t group, const std::string& meta, const std::string& arrangement,
                                    std::int64_t window, std::int64_t sliding_window);

std::tuple<Tensor, Tensor> decode_attention(const Tensor& q, const OptionalTensor& cu_seqlens_q, const Tensor& pages,
                                            const Tensor& page_table, const Tensor& sink_k, const Tensor& sink_v,
                                            const Tensor& ring_k, const Tensor& ring_v, const Tensor& kv_len,
                                            const Tensor& exponents, const OptionalTensor& learned_sinks,
                                            const OptionalTensor& logit_shift, const OptionalTensor& workspace,
                                            const std::string& k_format, const std::string& v_format,
                                            std::int64_t group, const std::string& meta, const std::string& arrangement,
                                            std::int64_t window, double softmax_scale, std::int64_t sliding_window,
                                            double softcap, bool queries_in_cache, bool exact);

// Throws what decode_attention would throw for rows of this dtype on such a device.
void check_decode_format(const std::string& k_format, const std::string& v_format, std::int64_t group,
                         const std::string& meta, const std::string& arrangement, std::int64_t head_dim,
                         ScalarType dtype, const std::string& device_type);

}  // namespace skvq::ops

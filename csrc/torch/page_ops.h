#pragma once

#include <tuple>

#include "torch/checks.h"

namespace skvq::ops {

void copy_pages(Tensor pages, const Tensor& source_ids, const Tensor& target_ids);

std::tuple<Tensor, Tensor> unpack_pages(const Tensor& pages, const Tensor& page_ids, const Tensor& exponents,
                                        const std::string& k_format, const std::string& v_format, std::int64_t group,
                                        const std::string& meta, const std::string& arrangement, std::int64_t head_dim);

// From `arrangement` to `target`, on the CPU.
Tensor repack_pages(const Tensor& pages, const std::string& k_format, const std::string& v_format, std::int64_t group,
                    const std::string& meta, const std::string& arrangement, const std::string& target,
                    std::int64_t head_dim);

}  // namespace skvq::ops

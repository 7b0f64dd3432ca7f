// Ops on packed pages.
#include "torch/page_ops.h"

#include <vector>

#include "cpu/cpu.h"
#include "torch/threads.h"

namespace skvq::ops {
namespace {

void check_page_ids(const Tensor& ids, const char* name, std::int64_t num_pages, const Place& place) {
  SKVQ_CHECK(ids.dim() == 1, name, " has shape ", shape_of(ids), "; expected one dimension");
  check_tensor(ids, name, ScalarType::Int, {ids.size(0)}, place);
  const std::int32_t* data = ids.const_data_ptr<std::int32_t>();
  for (std::int64_t i = 0; place.on_cpu && i < ids.size(0); ++i) {
    SKVQ_CHECK(data[i] >= 0 && data[i] < num_pages, name, "[", i, "] is ", data[i], "; pages are 0 to ", num_pages - 1);
  }
}

void check_distinct(const std::int32_t* source, const std::int32_t* target, std::int64_t count,
                    std::int64_t num_pages) {
  std::vector<char> is_target(num_pages, 0);
  for (std::int64_t i = 0; i < count; ++i) {
    SKVQ_CHECK(!is_target[target[i]], "target_ids names page ", target[i], " twice");
    is_target[target[i]] = 1;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    SKVQ_CHECK(!is_target[source[i]], "page ", source[i],
               " is both source and target; the result would depend on the order");
  }
}

// Shape of `pages`; `record_bytes` -1: any.
void check_pages(const Tensor& pages, std::int64_t record_bytes, const Place& place) {
  SKVQ_CHECK(pages.dim() == 3, "pages has shape ", shape_of(pages),
             "; expected [num_pages, num_kv_heads, record_bytes]");
  check_tensor(pages, "pages", ScalarType::Byte, {-1, -1, record_bytes}, place);
  check_alignment(pages, "pages", place);
}

}  // namespace

void copy_pages(Tensor pages, const Tensor& source_ids, const Tensor& target_ids) {
  const Place place = place_of(pages, "pages");
  check_pages(pages, -1, place);
  check_page_ids(source_ids, "source_ids", pages.size(0), place);
  check_page_ids(target_ids, "target_ids", pages.size(0), place);
  SKVQ_CHECK(source_ids.size(0) == target_ids.size(0), "source_ids and target_ids have ", source_ids.size(0), " and ",
             target_ids.size(0), " entries; expected as many");
  CopyPagesArgs a{};
  a.pages = static_cast<std::uint8_t*>(pages.mutable_data_ptr());
  a.source_ids = source_ids.const_data_ptr<std::int32_t>();
  a.target_ids = target_ids.const_data_ptr<std::int32_t>();
  a.count = source_ids.size(0);
  a.page_bytes = pages.size(1) * pages.size(2);
  if (place.on_cpu) check_distinct(a.source_ids, a.target_ids, a.count, pages.size(0));
  place.backend->copy_pages(a, place);
}

std::tuple<Tensor, Tensor> unpack_pages(const Tensor& pages, const Tensor& page_ids, const Tensor& exponents,
                                        const std::string& k_format, const std::string& v_format, std::int64_t group,
                                        const std::string& meta, const std::string& arrangement,
                                        std::int64_t head_dim) {
  const Place place = place_of(pages, "pages");
  UnpackPagesArgs a{};
  a.format = parse({k_format, v_format, group, meta, arrangement}, head_dim);
  check_pages(pages, a.format.record_bytes(), place);
  check_page_ids(page_ids, "page_ids", pages.size(0), place);
  check_tensor(exponents, "exponents", ScalarType::Int, {pages.size(1), 4}, place);
  a.num_pages = static_cast<int>(page_ids.size(0));
  a.num_kv_heads = static_cast<int>(pages.size(1));
  const auto values = [&] {
    return new_tensor(pages, {page_ids.size(0), pages.size(1), kTileTokens, head_dim}, ScalarType::Float);
  };
  Tensor k = values(), v = values();
  a.pages = static_cast<const std::uint8_t*>(pages.const_data_ptr());
  a.page_ids = page_ids.const_data_ptr<std::int32_t>();
  a.exponents = exponents.const_data_ptr<std::int32_t>();
  a.k = static_cast<float*>(k.mutable_data_ptr());
  a.v = static_cast<float*>(v.mutable_data_ptr());
  place.backend->unpack_pages(a, place);
  return {k, v};
}

Tensor repack_pages(const Tensor& pages, const std::string& k_format, const std::string& v_format, std::int64_t group,
                    const std::string& meta, const std::string& arrangement, const std::string& target,
                    std::int64_t head_dim) {
  const Place place = place_of(pages, "pages");
  SKVQ_CHECK(place.on_cpu, "pages is on a GPU; pages are repacked on the CPU: call .cpu() on it");
  cpu::RepackArgs a{};
  a.format = parse({k_format, v_format, group, meta, arrangement}, head_dim);
  a.target = parse({k_format, v_format, group, meta, target}, head_dim).arrangement;
  check_pages(pages, a.format.record_bytes(), place);
  Tensor out = torch::stable::new_empty(pages, pages.sizes());
  a.num_records = pages.size(0) * pages.size(1);
  a.from = static_cast<const std::uint8_t*>(pages.const_data_ptr());
  a.to = static_cast<std::uint8_t*>(out.mutable_data_ptr());
  cpu::repack_records(a, torch_threads());
  return out;
}

}  // namespace skvq::ops

// Decode attention on the host side: which kernel, how much workspace, two launches.
#include <algorithm>
#include <stdexcept>

#include "core/format_text.h"
#include "cuda/checks.h"
#include "cuda/combine.cuh"
#include "cuda/instance.cuh"
#include "cuda/instances/list.h"

namespace skvq::cuda {

#define SKVQ_DECLARE(file) void file(InstanceList& list);
SKVQ_INSTANCE_FILES(SKVQ_DECLARE)
#undef SKVQ_DECLARE

namespace {

const InstanceList& instances() {
  static const InstanceList list = [] {
    InstanceList all;
#define SKVQ_ADD(file) file(all);
    SKVQ_INSTANCE_FILES(SKVQ_ADD)
#undef SKVQ_ADD
    return all;
  }();
  return list;
}

// Trits in fields of two bits are read as what they lie in.
Code stored_as(Code code) {
  return code == Code::kTernaryFast ? Code::kInt2 : code;
}

// The same bytes mean the same numbers: group sizes that no band reaches are all alike.
bool same_tensor(const TensorFormat& a, const TensorFormat& b) {
  if (a.head_dim != b.head_dim || a.num_bands != b.num_bands || a.num_groups() != b.num_groups()) return false;
  for (int i = 0; i < a.num_bands; ++i) {
    if (stored_as(a.bands[i].code) != stored_as(b.bands[i].code) || a.bands[i].channels != b.bands[i].channels)
      return false;
  }
  for (int g = 0; g < a.num_groups(); ++g) {
    if (a.group_at(g).end != b.group_at(g).end) return false;
  }
  return true;
}

std::string tensor_text(const TensorFormat& f) {
  std::string text = traits(f.bands[0].code).name;
  if (f.num_bands == 2) {
    text += concat(":", f.bands[0].channels, "/", f.head_dim, "+", traits(f.bands[1].code).name);
  }
  return text;
}
std::string format_name(const RecordFormat& f) {
  return concat("k", tensor_text(f.k), "-v", tensor_text(f.v), "-g", f.k.group, " at head_dim ", f.k.head_dim);
}

const DecodeInstance& find_instance(const RecordFormat& format) {
  for (const DecodeInstance& instance : instances()) {
    if (same_tensor(instance.format.k, format.k) && same_tensor(instance.format.v, format.v)) return instance;
  }
  throw std::invalid_argument(concat("no CUDA decode kernel was built for ", format_name(format), "; built are:\n",
                                     decode_instances(),
                                     "Use one of these, or add a line to csrc/cuda/instances and rebuild."));
}

const DecodeInstance& instance_for(const RecordFormat& format, DType q_dtype, DType cache_dtype) {
  if (q_dtype != cache_dtype || q_dtype == DType::kF32) {
    constexpr const char* names[] = {"float32", "float16", "bfloat16"};
    throw std::invalid_argument(concat("q is ", names[static_cast<int>(q_dtype)], " and the cache holds ",
                                       names[static_cast<int>(cache_dtype)],
                                       "; the CUDA decode kernel takes float16 or bfloat16, the same for both"));
  }
  check_arrangement(format);
  return find_instance(format);
}

struct Plan {
  const DecodeInstance* instance;
  DecodeParams params;
  std::int64_t slots;
  std::size_t shared_bytes;
};

Plan make_plan(const DecodeArgs& args) {
  const CacheView& c = args.cache;
  const RecordFormat& f = c.format;
  if (c.num_pages * c.num_kv_heads * f.record_bytes() > (std::int64_t{1} << 36)) {
    throw std::invalid_argument(concat("pages has ", c.num_pages * c.num_kv_heads * f.record_bytes(),
                                       " bytes; the CUDA kernels address at most 64 GiB in one pool"));
  }
  Plan plan{&instance_for(f, args.q_dtype, c.dtype), {}, 0, 0};
  DecodeParams& p = plan.params;
  p.args = args;
  p.group_columns = kColumns * plan.instance->warps;
  p.record_bytes = f.record_bytes();
  p.k_meta_offset = f.meta_offset(Side::kKey);
  p.v_codes_offset = f.codes_offset(Side::kValue);
  p.v_meta_offset = f.meta_offset(Side::kValue);
  p.stage_bytes = stage_bytes(p.record_bytes, c.head_dim);
  plan.shared_bytes = static_cast<std::size_t>(plan.instance->warps) * plan.instance->stages * p.stage_bytes;
  constexpr int kReserved = 3072;  // the kernel's other shared memory, and the 1 KiB the system takes
  const int fit = shared_bytes_per_multiprocessor() / static_cast<int>(plan.shared_bytes + kReserved);
  p.blocks = multiprocessors() * std::max(1, std::min(plan.instance->blocks_per_multiprocessor, fit));
  const std::int64_t rows = args.queries.num_tokens * (args.num_q_heads / c.num_kv_heads);  // of one KV head
  const bool equal = args.queries.cu_seqlens == nullptr;
  const std::int64_t longest = equal ? rows / std::max(1, c.batch) : rows;
  const std::int64_t items =
      equal ? c.batch * ((longest + p.group_columns - 1) / p.group_columns) : rows / p.group_columns + c.batch;
  p.slot_columns = static_cast<int>(std::min<std::int64_t>(p.group_columns, longest));
  plan.slots = items * c.num_kv_heads + p.blocks;
  return plan;
}

std::int64_t slot_rows(const Plan& plan) {
  return (plan.slots * plan.params.slot_columns + 1) / 2 * 2;  // so that what follows the states is aligned to 16 bytes
}

}  // namespace

std::string decode_instances() {
  std::string text;
  for (const DecodeInstance& instance : instances()) text += format_name(instance.format) + "\n";
  return text;
}

void check_decode_format(const RecordFormat& format, DType q_dtype, DType cache_dtype) {
  instance_for(format, q_dtype, cache_dtype);
}

std::size_t decode_workspace_bytes(const DecodeArgs& args) {
  const Plan plan = make_plan(args);
  return slot_rows(plan) * (sizeof(SoftmaxState) + args.cache.head_dim * sizeof(float));
}

void decode_attention(const DecodeArgs& args, void* workspace, Stream stream) {
  if (args.queries.num_tokens == 0) return;
  Plan plan = make_plan(args);
  plan.params.states = static_cast<SoftmaxState*>(workspace);
  plan.params.partial = reinterpret_cast<float*>(plan.params.states + slot_rows(plan));
  plan.instance->attend(plan.params, plan.shared_bytes, stream);
  combine(plan.params, stream);
}

}  // namespace skvq::cuda

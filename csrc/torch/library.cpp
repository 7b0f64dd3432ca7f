// Schemas of torch.ops.skvq and their kernels. Fake kernels are registered in skvq_ext/fake.py.
#include <torch/csrc/stable/library.h>

#include "build_info.h"
#include "cpu/kernels.h"
#include "torch/cache_ops.h"
#include "torch/page_ops.h"
#include "torch/tensor_ops.h"

namespace skvq::ops {
namespace {

const char* arrangement_name(ArrangementKind kind) {
  return kArrangementNames[static_cast<int>(kind)];
}

std::string describe_record(const std::string& k_format, const std::string& v_format, std::int64_t group,
                            const std::string& meta, const std::string& arrangement, std::int64_t head_dim) {
  return describe(
      parse_record_format(k_format, v_format, static_cast<int>(group), meta, arrangement, static_cast<int>(head_dim)));
}

std::string build_info() {
  return concat("{\"version\": \"" SKVQ_VERSION "\", \"compiler\": \"" SKVQ_COMPILER
                "\", \"torch_headers\": \"" SKVQ_TORCH_HEADERS "\", \"cuda\": ",
                cuda_json(), ", \"cpu_isas\": \"", cpu::built_isas(), "\", \"cpu_isa\": \"", cpu::kernels().isa,
                "\", \"arrangements\": {\"cpu\": \"", arrangement_name(cpu_backend().arrangement), "\", \"cuda\": \"",
                arrangement_name(ArrangementKind::kMma), "\"}}");
}

// Which kernels compute is decided by the place of the tensors (backend.h), not by the dispatcher.
template <class Library>
void implement(Library& m) {
  m.impl("permute_channels", TORCH_BOX(&permute_channels));
  m.impl("enter_heads", TORCH_BOX(&enter_heads));
  m.impl("leave_heads", TORCH_BOX(&leave_heads));
  m.impl("quantize_pack", TORCH_BOX(&quantize_pack));
  m.impl("dequantize_unpack", TORCH_BOX(&dequantize_unpack));
  m.impl("append", TORCH_BOX(&append));
  m.impl("decode_workspace_bytes", TORCH_BOX(&decode_workspace_bytes));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("merge_states", TORCH_BOX(&merge_states));
  m.impl("copy_pages", TORCH_BOX(&copy_pages));
  m.impl("unpack_pages", TORCH_BOX(&unpack_pages));
  m.impl("repack_pages", TORCH_BOX(&repack_pages));
}

}  // namespace
}  // namespace skvq::ops

STABLE_TORCH_LIBRARY(skvq, m) {
  m.def("permute_channels(Tensor x, Tensor permutation) -> Tensor");
  m.def(
      "enter_heads(Tensor x, Tensor? permutation, Tensor? shift, Tensor? scale, Tensor? matrix, int num_kv_heads) "
      "-> Tensor");
  m.def(
      "leave_heads(Tensor o, Tensor? permutation, Tensor? shift, Tensor? scale, Tensor? matrix, Tensor? share, "
      "int num_kv_heads) -> Tensor");
  m.def(
      "quantize_pack(Tensor x, Tensor group_start, Tensor? clip=None, *, str code, str meta=\"fp8\", int "
      "scale_exponent=0, "
      "int zero_exponent=0) -> (Tensor codes, Tensor meta)");
  m.def(
      "dequantize_unpack(Tensor codes, Tensor meta, Tensor group_start, *, str code, int scale_exponent=0, int "
      "zero_exponent=0) "
      "-> Tensor");
  m.def(
      "append(Tensor k, Tensor v, Tensor? cu_seqlens, Tensor(a!) pages, Tensor page_table, Tensor(b!) sink_k, "
      "Tensor(c!) sink_v, "
      "Tensor(d!) ring_k, Tensor(e!) ring_v, Tensor(f!) kv_len, Tensor k_clip, Tensor v_clip, Tensor exponents, str "
      "k_format, "
      "str v_format, int group, str meta, str arrangement, int window) -> ()");
  m.def(
      "decode_attention(Tensor q, Tensor? cu_seqlens_q, Tensor pages, Tensor page_table, Tensor sink_k, Tensor sink_v, "
      "Tensor ring_k, Tensor ring_v, Tensor kv_len, Tensor exponents, Tensor? learned_sinks=None, Tensor? "
      "logit_shift=None, "
      "Tensor(a!)? workspace=None, *, str k_format, str v_format, int group, str meta, str arrangement, int window, "
      "float softmax_scale, int "
      "sliding_window=0, "
      "float softcap=0.0, bool queries_in_cache=True, bool exact=False) -> (Tensor out, Tensor lse)");
  m.def(
      "decode_workspace_bytes(Tensor q, Tensor? cu_seqlens_q, Tensor pages, Tensor page_table, Tensor sink_k, Tensor "
      "sink_v, Tensor ring_k, Tensor ring_v, Tensor kv_len, Tensor exponents, *, str k_format, str v_format, int "
      "group, "
      "str meta, str arrangement, int window, int sliding_window=0) -> int");
  m.def("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
  m.def("copy_pages(Tensor(a!) pages, Tensor source_ids, Tensor target_ids) -> ()");
  m.def(
      "unpack_pages(Tensor pages, Tensor page_ids, Tensor exponents, *, str k_format, str v_format, int group, str "
      "meta, "
      "str arrangement, int head_dim) -> (Tensor k, Tensor v)");
  m.def(
      "repack_pages(Tensor pages, *, str k_format, str v_format, int group, str meta, str arrangement, str target, int "
      "head_dim) -> Tensor");
  m.def(
      "check_decode_format(str k_format, str v_format, int group, str meta, str arrangement, int head_dim, ScalarType "
      "dtype, str device_type) -> ()");
  m.def("format_table() -> str");
  m.def("describe_record(str k_format, str v_format, int group, str meta, str arrangement, int head_dim) -> str");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(skvq, CPU, m) {
  skvq::ops::implement(m);
}

STABLE_TORCH_LIBRARY_IMPL(skvq, CUDA, m) {
  skvq::ops::implement(m);
}

STABLE_TORCH_LIBRARY_IMPL(skvq, CompositeExplicitAutograd, m) {
  m.impl("format_table", TORCH_BOX(&skvq::format_table));
  m.impl("describe_record", TORCH_BOX(&skvq::ops::describe_record));
  m.impl("check_decode_format", TORCH_BOX(&skvq::ops::check_decode_format));
  m.impl("build_info", TORCH_BOX(&skvq::ops::build_info));
}

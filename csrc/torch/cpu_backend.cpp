// The kernels of csrc/cpu on torch's threads.
#include <torch/csrc/stable/ops.h>

#include "cpu/cpu.h"
#include "torch/backend.h"
#include "torch/threads.h"

namespace skvq::ops {
namespace {

template <class Args, void (*Function)(const Args&, const cpu::Parallel&)>
void run(const Args& args, const Place&) {
  Function(args, torch_threads());
}

}  // namespace

const Backend& cpu_backend() {
  static constexpr Backend backend{
      .arrangement = ArrangementKind::kLanes,
      .alignment = 1,
      .append = run<AppendArgs, cpu::append>,
      .check_decode_format = [](const RecordFormat&, DType, DType) {},
      .decode_workspace_bytes = [](const DecodeArgs&, const Place&) -> std::size_t { return 0; },
      .decode_attention = [](const DecodeArgs& args, void*,
                             const Place&) { cpu::decode_attention(args, torch_threads()); },
      .map_heads = run<MapHeadsArgs, cpu::map_heads>,
      .permute_channels = run<PermuteArgs, cpu::permute_channels>,
      .quantize_rows = run<QuantizeRowsArgs, cpu::quantize_rows>,
      .dequantize_rows = run<QuantizeRowsArgs, cpu::dequantize_rows>,
      .merge_states = run<MergeArgs, cpu::merge_states>,
      .copy_pages = run<CopyPagesArgs, cpu::copy_pages>,
      .unpack_pages = run<UnpackPagesArgs, cpu::unpack_pages>,
  };
  return backend;
}

}  // namespace skvq::ops

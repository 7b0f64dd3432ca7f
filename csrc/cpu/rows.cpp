#include "core/window.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"

namespace skvq::cpu {
namespace {

constexpr std::int64_t kRowsPerTask = 64;

using RangeKernel = void (*)(const QuantizeRowsArgs&, std::int64_t, std::int64_t);

void run_rows(const QuantizeRowsArgs& a, const Parallel& parallel, RangeKernel kernel) {
  for_each(parallel, (a.num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t i) {
    const std::int64_t end = (i + 1) * kRowsPerTask;
    kernel(a, i * kRowsPerTask, end < a.num_rows ? end : a.num_rows);
  });
}

}  // namespace

void map_heads(const MapHeadsArgs& a, const Parallel& parallel) {
  constexpr std::int64_t kTokensPerTask = 16;
  const PackKernels& pack = kernels().pack;
  for_each(parallel, (a.num_tokens + kTokensPerTask - 1) / kTokensPerTask, [&](std::int64_t i) {
    for (std::int64_t t = i * kTokensPerTask; t < (i + 1) * kTokensPerTask && t < a.num_tokens; ++t)
      pack.map_heads(a, t);
  });
}

void quantize_rows(const QuantizeRowsArgs& a, const Parallel& parallel) {
  run_rows(a, parallel, kernels().pack.quantize_rows);
}

void dequantize_rows(const QuantizeRowsArgs& a, const Parallel& parallel) {
  run_rows(a, parallel, kernels().pack.dequantize_rows);
}

void unpack_pages(const UnpackPagesArgs& a, const Parallel& parallel) {
  const PackKernels& pack = kernels().pack;
  for_each(parallel, static_cast<std::int64_t>(a.num_pages) * a.num_kv_heads, [&](std::int64_t i) {
    const std::int64_t head = i % a.num_kv_heads, page = a.page_ids[i / a.num_kv_heads];
    const std::uint8_t* record = a.pages + (page * a.num_kv_heads + head) * a.format.record_bytes();
    const std::int32_t* e = a.exponents + head * 4;
    const std::int64_t out = i * kTileTokens * a.format.k.head_dim;
    pack.dequantize_record(a.format, Side::kKey, {e[0], e[1]}, record, a.k + out);
    pack.dequantize_record(a.format, Side::kValue, {e[2], e[3]}, record, a.v + out);
  });
}

}  // namespace skvq::cpu

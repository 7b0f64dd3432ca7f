#include <cstring>

#include "core/window.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"

namespace skvq::cpu {
namespace {

constexpr std::int64_t kRowsPerTask = 64;

using RangeKernel = void (*)(const QuantizeRowsArgs&, std::int64_t, std::int64_t);

void run_rows(const QuantizeRowsArgs& a, const Parallel& parallel, RangeKernel kernel) {
  for_each(parallel, (a.num_rows + kRowsPerTask - 1) / kRowsPerTask, kRowsPerTask * a.num_channels,
           [&](std::int64_t i) {
             const std::int64_t end = (i + 1) * kRowsPerTask;
             kernel(a, i * kRowsPerTask, end < a.num_rows ? end : a.num_rows);
           });
}

}  // namespace

void map_heads(const MapHeadsArgs& a, const Parallel& parallel) {
  constexpr std::int64_t kTokensPerTask = 16;
  const PackKernels& pack = kernels().pack;
  const std::int64_t ns = kTokensPerTask * a.num_heads * a.head_dim * (a.matrix ? a.head_dim / 16 : 1);
  for_each(parallel, (a.num_tokens + kTokensPerTask - 1) / kTokensPerTask, ns, [&](std::int64_t i) {
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

namespace {

template <class T>
void permute_row(const PermuteArgs& a, std::int64_t row) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  for (int h = 0; h < a.num_heads; ++h) {
    const std::int64_t base = (row * a.num_heads + h) * a.head_dim;
    const std::int32_t* from = a.permutation + static_cast<std::int64_t>(h) * a.head_dim;
    for (int c = 0; c < a.head_dim; ++c) out[base + c] = x[base + from[c]];
  }
}

}  // namespace

void permute_channels(const PermuteArgs& a, const Parallel& parallel) {
  for_each(parallel, a.num_rows, static_cast<std::int64_t>(a.num_heads) * a.head_dim, [&](std::int64_t row) {
    a.element_bytes == 4 ? permute_row<float>(a, row) : permute_row<std::uint16_t>(a, row);
  });
}

void copy_pages(const CopyPagesArgs& a, const Parallel& parallel) {
  for_each(parallel, a.count, a.page_bytes / 8, [&](std::int64_t i) {
    std::memcpy(a.pages + a.target_ids[i] * a.page_bytes, a.pages + a.source_ids[i] * a.page_bytes, a.page_bytes);
  });
}

void unpack_pages(const UnpackPagesArgs& a, const Parallel& parallel) {
  const PackKernels& pack = kernels().pack;
  const std::int64_t codes = 2 * kTileTokens * a.format.k.head_dim;
  for_each(parallel, static_cast<std::int64_t>(a.num_pages) * a.num_kv_heads, codes, [&](std::int64_t i) {
    const std::int64_t head = i % a.num_kv_heads, page = a.page_ids[i / a.num_kv_heads];
    const std::uint8_t* record = a.pages + (page * a.num_kv_heads + head) * a.format.record_bytes();
    const std::int32_t* e = a.exponents + head * 4;
    const std::int64_t out = i * kTileTokens * a.format.k.head_dim;
    pack.dequantize_record(a.format, Side::kKey, {e[0], e[1]}, record, a.k + out);
    pack.dequantize_record(a.format, Side::kValue, {e[2], e[3]}, record, a.v + out);
  });
}

void repack_records(const RepackArgs& a, const Parallel& parallel) {
  const PackKernels& pack = kernels().pack;
  const std::int64_t bytes = a.format.record_bytes();
  for_each(parallel, a.num_records, 2 * kTileTokens * a.format.k.head_dim,
           [&](std::int64_t i) { pack.repack_record(a.format, a.target, a.from + i * bytes, a.to + i * bytes); });
}

}  // namespace skvq::cpu

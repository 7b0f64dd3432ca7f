#include <vector>

#include "core/window.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"

namespace skvq::cpu {

void append(const AppendArgs& a, const Parallel& parallel) {
  const CacheView& c = a.cache;
  const PackKernels& pack = kernels().pack;
  struct Flush {
    int sequence, tile;
  };
  std::vector<Flush> flushes;
  for (int b = 0; b < c.batch; ++b) {
    const int old_len = c.kv_len[b], new_len = old_len + a.tokens.length(b);
    const int end = packed_tiles(new_len, c.num_sinks, c.window);
    for (int tile = packed_tiles(old_len, c.num_sinks, c.window); tile < end; ++tile) flushes.push_back({b, tile});
  }
  const auto heads = c.num_kv_heads;
  const std::int64_t flush_ns = kTileTokens * c.head_dim;
  for_each(parallel, static_cast<std::int64_t>(flushes.size()) * heads, flush_ns, [&](std::int64_t i) {
    const Flush& flush = flushes[i / heads];
    pack.flush_tile(a, flush.sequence, static_cast<int>(i % heads), flush.tile);
  });
  // Only now may the ring be overwritten.
  const std::int64_t copy_ns = 50 + a.tokens.num_tokens / max_int(1, c.batch) * c.head_dim / 4;
  for_each(parallel, static_cast<std::int64_t>(c.batch) * heads, copy_ns,
           [&](std::int64_t i) { pack.store_rows(a, static_cast<int>(i / heads), static_cast<int>(i % heads)); });
  for (int b = 0; b < c.batch; ++b) c.kv_len[b] += a.tokens.length(b);
}

}  // namespace skvq::cpu

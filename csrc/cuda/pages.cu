// Whole pages: copies inside a pool, and their values in fp32.
#include "core/minifloat.h"
#include "core/read_code.h"
#include "cuda/checks.h"
#include "cuda/launch.cuh"

namespace skvq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCopyBatch = 4;                                              // vectors a thread has under way at once
constexpr std::int64_t kCopyBytes = kThreads * kCopyBatch * kVectorBytes;  // of a page that a block copies

// Blocks (pages, parts of a page). The ids lie on the device, where the host cannot look without waiting: -1 copies
// nothing, and ids must be below the number of pages.
__global__ void __launch_bounds__(kThreads) copy_page_parts(const __grid_constant__ CopyPagesArgs a) {
  const std::int64_t source = a.source_ids[blockIdx.x], target = a.target_ids[blockIdx.x];
  if (source < 0 || target < 0) return;
  const std::int64_t first = blockIdx.y * kCopyBytes + threadIdx.x * kVectorBytes;
  uint4 x[kCopyBatch];
#pragma unroll
  for (int i = 0; i < kCopyBatch; ++i) {
    const std::int64_t at = first + i * (kThreads * kVectorBytes);
    if (at < a.page_bytes) x[i] = *reinterpret_cast<const uint4*>(a.pages + source * a.page_bytes + at);
  }
#pragma unroll
  for (int i = 0; i < kCopyBatch; ++i) {
    const std::int64_t at = first + i * (kThreads * kVectorBytes);
    if (at < a.page_bytes) *reinterpret_cast<uint4*>(a.pages + target * a.page_bytes + at) = x[i];
  }
}

// Blocks (pages, sides of heads): one side of one record, a thread for a token and channel at a time.
__global__ void __launch_bounds__(kThreads) unpack_records(const __grid_constant__ UnpackPagesArgs a) {
  const int head = static_cast<int>(blockIdx.y) / 2;
  const Side side = blockIdx.y % 2 == 0 ? Side::kKey : Side::kValue;
  const std::int64_t page = a.page_ids[blockIdx.x];
  if (page < 0) return;
  const TensorFormat& tensor = a.format.side(side);
  const std::uint8_t* record = a.pages + (page * a.num_kv_heads + head) * a.format.record_bytes();
  const std::uint8_t* meta = record + a.format.meta_offset(side);
  const std::int32_t* exponents = a.exponents + head * 4 + (side == Side::kKey ? 0 : 2);
  const std::int64_t values = static_cast<std::int64_t>(kTileTokens) * tensor.head_dim;
  float* out =
      (side == Side::kKey ? a.k : a.v) + (blockIdx.x * static_cast<std::int64_t>(a.num_kv_heads) + head) * values;
  const int groups = tensor.num_groups();
  for (int g = 0; g < groups; ++g) {
    const Group group = tensor.group_at(g);
    const Band band = tensor.bands[group.band];
    const std::uint8_t* codes = record + a.format.band_offset(side, group.band);
    const int channels = group.end - group.begin;
    for (int i = static_cast<int>(threadIdx.x); i < kTileTokens * channels; i += kThreads) {
      const int token = i / channels, channel = group.begin + i % channels;
      const auto decoded = [&](int which) {
        return decode_meta(a.format.meta, load_meta(a.format.meta, meta, Mma::meta(groups, token, g, which)));
      };
      const float scale = decoded(0) * power_of_two(exponents[0]), zero = decoded(1) * power_of_two(exponents[1]);
      const int code = read_code<Mma>(side, band, codes, token, channel - band.begin);
      out[token * tensor.head_dim + channel] = static_cast<float>(code) * scale + zero;
    }
  }
}

}  // namespace

void copy_pages(const CopyPagesArgs& a, Stream stream) {
  check_aligned(a.pages, "pages");
  if (a.page_bytes % kVectorBytes != 0) {
    throw std::invalid_argument(concat("a page has ", a.page_bytes, " bytes, no multiple of ", kVectorBytes,
                                       ": these are not the pages of a cache"));
  }
  launch("copy_page_parts", copy_page_parts, {a.count, (a.page_bytes + kCopyBytes - 1) / kCopyBytes}, kThreads, 0,
         stream, a);
}

void unpack_pages(const UnpackPagesArgs& a, Stream stream) {
  check_arrangement(a.format);
  check_aligned(a.pages, "pages");
  launch("unpack_records", unpack_records, {a.num_pages, 2 * a.num_kv_heads}, kThreads, 0, stream, a);
}

}  // namespace skvq::cuda

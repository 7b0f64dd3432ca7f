// Quantize-pack and dequantize-unpack of the rows of a matrix, with groups of any size that start at bytes.
#include "core/quantize.h"
#include "core/row_codes.h"
#include "core/window.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace skvq::cuda {
namespace {

constexpr int kThreads = 128;

// What one warp works on: a group of a row.
struct RowGroup {
  std::int64_t row;
  int group, first, channels;
  std::int64_t bytes;  // where its codes start
};

// Visits the groups of the rows that this warp has to do.
template <class F>
SKVQ_DEVICE void each_group(const QuantizeRowsArgs& a, F&& visit) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_index();
  if (row >= a.num_rows) return;
  std::int64_t bytes = row * a.row_bytes;
  for (int g = 0; g < a.num_groups; ++g) {
    const int first = a.group_start[g], channels = a.group_start[g + 1] - first;
    visit(RowGroup{row, g, first, channels, bytes});
    bytes += group_row_bytes(a.code, channels);
  }
}

SKVQ_DEVICE GroupQuantizer quantizer_of(const QuantizeRowsArgs& a, const RowGroup& r, int levels) {
  const auto x = [&](int i) { return load_float(a.dtype, a.x, r.row * a.num_channels + r.first + i); };
  float low = x(0), high = low;
  for (int i = lane_index(); i < r.channels; i += kWarp) {
    low = ptx::min_f32(low, x(i));
    high = ptx::max_f32(high, x(i));
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    low = ptx::min_f32(low, __shfl_xor_sync(kAllLanes, low, distance));
    high = ptx::max_f32(high, __shfl_xor_sync(kAllLanes, high, distance));
  }
  const bool finite = low * 0.0f + high * 0.0f == 0.0f;
  const auto make = [&](float clip) {
    return make_group_quantizer(low, high, finite, clip, levels, a.meta_type, a.exponents);
  };
  const float parts = error_parts(low, high);
  return fit_quantizer(a, r.group, make, [&](const GroupQuantizer& q) {
    std::uint32_t error = 0;
    for (int i = lane_index(); i < r.channels; i += kWarp) error += squared_error(x(i), q, levels, parts);
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      error += __shfl_xor_sync(kAllLanes, error, distance);
    }
    return error;
  });
}

// Lanes take runs of codes that have their bytes to themselves.
__global__ void __launch_bounds__(kThreads) quantize_row(const __grid_constant__ QuantizeRowsArgs a) {
  const int levels = traits(a.code).levels, run = codes_in_whole_bytes(a.code), lane = lane_index();
  each_group(a, [&](const RowGroup& r) {
    const GroupQuantizer q = quantizer_of(a, r, levels);
    if (lane == 0) {
      store_meta(a.meta_type, a.meta, (r.row * a.num_groups + r.group) * 2, q.scale_bits);
      store_meta(a.meta_type, a.meta, (r.row * a.num_groups + r.group) * 2 + 1, q.zero_bits);
    }
    std::uint8_t* out = a.codes + r.bytes;
    for (int first = lane * run; first < r.channels; first += kWarp * run) {
      const int end = min_int(first + run, r.channels);
      for (int i = first; i < end; ++i)
        each_part(a.code, r.channels, i, [&](int byte, int, int, int) { out[byte] = 0; });
      for (int i = first; i < end; ++i) {
        const float x = load_float(a.dtype, a.x, r.row * a.num_channels + r.first + i);
        const int value = quantize(x, q, levels);
        each_part(a.code, r.channels, i, [&](int byte, int shift, int low_bit, int width) {
          const int part = width == 0 ? value * shift : ((value >> low_bit) & ((1 << width) - 1)) << shift;
          out[byte] = static_cast<std::uint8_t>(out[byte] + part);
        });
      }
    }
  });
}

__global__ void __launch_bounds__(kThreads) dequantize_row(const __grid_constant__ QuantizeRowsArgs a) {
  each_group(a, [&](const RowGroup& r) {
    const auto decoded = [&](int which, int exponent) {
      const std::int64_t at = (r.row * a.num_groups + r.group) * 2 + which;
      return decode_meta(a.meta_type, load_meta(a.meta_type, a.meta, at)) * power_of_two(exponent);
    };
    const float scale = decoded(0, a.exponents.scale), zero = decoded(1, a.exponents.zero);
    const std::uint8_t* in = a.codes + r.bytes;
    for (int i = lane_index(); i < r.channels; i += kWarp) {
      int value = 0;
      each_part(a.code, r.channels, i, [&](int byte, int shift, int low_bit, int width) {
        value += width == 0 ? in[byte] / shift % 3 : ((in[byte] >> shift) & ((1 << width) - 1)) << low_bit;
      });
      a.decoded[r.row * a.num_channels + r.first + i] = static_cast<float>(value) * scale + zero;
    }
  });
}

Grid grid_of(const QuantizeRowsArgs& a) {
  constexpr int kRowsPerBlock = kThreads / kWarp;
  return {(a.num_rows + kRowsPerBlock - 1) / kRowsPerBlock};
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& a, Stream stream) {
  launch("quantize_row", quantize_row, grid_of(a), kThreads, 0, stream, a);
}

void dequantize_rows(const QuantizeRowsArgs& a, Stream stream) {
  launch("dequantize_row", dequantize_row, grid_of(a), kThreads, 0, stream, a);
}

}  // namespace skvq::cuda

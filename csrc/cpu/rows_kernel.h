// Quantize-pack and dequantize-unpack of the rows of a matrix, with groups of any size that start at bytes.
#pragma once

#include "core/quantize.h"
#include "core/row_codes.h"
#include "cpu/vector.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// With the first of the clip ratios that errs least. Args: x, of the channels 0 to n - 1 of the group.
template <class X>
GroupQuantizer fit_group(const QuantizeRowsArgs& a, const X& x, int group, int n) {
  const int levels = traits(a.code).levels;
  float low = x(0), high = low, nan = 0.0f;
  for (int i = 0; i < n; ++i) {
    low = x(i) < low ? x(i) : low;
    high = x(i) > high ? x(i) : high;
    nan += x(i) * 0.0f;
  }
  const auto make = [&](float clip) {
    return make_group_quantizer(low, high, nan == 0.0f, clip, levels, a.meta_type, a.exponents);
  };
  const float parts = error_parts(low, high);
  return fit_quantizer(a, group, make, [&](const GroupQuantizer& q) {
    std::uint32_t error = 0;
    for (int i = 0; i < n; ++i) error += squared_error(x(i), q, levels, parts);
    return error;
  });
}

inline void quantize_rows_range(const QuantizeRowsArgs& a, std::int64_t begin, std::int64_t end) {
  const int levels = traits(a.code).levels;
  for (std::int64_t row = begin; row < end; ++row) {
    std::uint8_t* out = a.codes + row * a.row_bytes;
    for (int i = 0; i < a.row_bytes; ++i) out[i] = 0;
    for (int g = 0; g < a.num_groups; ++g) {
      const int first = a.group_start[g], n = a.group_start[g + 1] - first;
      const auto x = [&](int i) { return load_float(a.dtype, a.x, row * a.num_channels + first + i); };
      const GroupQuantizer q = fit_group(a, x, g, n);
      store_meta(a.meta_type, a.meta, (row * a.num_groups + g) * 2, q.scale_bits);
      store_meta(a.meta_type, a.meta, (row * a.num_groups + g) * 2 + 1, q.zero_bits);
      for (int i = 0; i < n; ++i) {
        const int value = quantize(x(i), q, levels);
        each_part(a.code, n, i, [&](int byte, int shift, int low_bit, int width) {
          const int part = width == 0 ? value * shift : ((value >> low_bit) & ((1 << width) - 1)) << shift;
          out[byte] = static_cast<std::uint8_t>(out[byte] + part);
        });
      }
      out += group_row_bytes(a.code, n);
    }
  }
}

inline void dequantize_rows_range(const QuantizeRowsArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::uint8_t* in = a.codes + row * a.row_bytes;
    for (int g = 0; g < a.num_groups; ++g) {
      const int first = a.group_start[g], n = a.group_start[g + 1] - first;
      const auto meta = [&](int which, int exponent) {
        return decode_meta(a.meta_type, load_meta(a.meta_type, a.meta, (row * a.num_groups + g) * 2 + which)) *
               power_of_two(exponent);
      };
      const float scale = meta(0, a.exponents.scale), zero = meta(1, a.exponents.zero);
      for (int i = 0; i < n; ++i) {
        int value = 0;
        each_part(a.code, n, i, [&](int byte, int shift, int low_bit, int width) {
          value += width == 0 ? in[byte] / shift % 3 : ((in[byte] >> shift) & ((1 << width) - 1)) << low_bit;
        });
        a.decoded[row * a.num_channels + first + i] = static_cast<float>(value) * scale + zero;
      }
      in += group_row_bytes(a.code, n);
    }
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

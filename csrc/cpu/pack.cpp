// Kernels whose results must agree in every bit on all instruction sets.

// Loops over the quantizer of a group become vector instructions only where its choices may be computed both ways,
// which changes no result.
#pragma GCC optimize("no-trapping-math", "no-thread-jumps")

#include "cpu/append_kernel.h"
#include "cpu/heads_kernel.h"
#include "cpu/kernels.h"
#include "cpu/repack_kernel.h"
#include "cpu/rows_kernel.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

template <class Arrangement>
void dequantize_side(const RecordFormat& format, Side side, Exponents exponents, const std::uint8_t* record,
                     float* out) {
  const TensorFormat& tensor = format.side(side);
  const int groups = tensor.num_groups();
  const std::uint8_t* meta = record + format.meta_offset(side);
  for (int g = 0; g < groups; ++g) {
    const Group group = tensor.group_at(g);
    const Band& band = tensor.bands[group.band];
    const std::uint8_t* codes = record + format.band_offset(side, group.band);
    for (int t = 0; t < kTileTokens; ++t) {
      const auto at = [&](int which) {
        return decode_meta(format.meta, load_meta(format.meta, meta, Arrangement::meta(groups, t, g, which)));
      };
      const float scale = at(0) * power_of_two(exponents.scale), zero = at(1) * power_of_two(exponents.zero);
      for (int c = group.begin; c < group.end; ++c) {
        const int code = read_code<Arrangement>(side, band, codes, t, c - band.begin);
        out[t * tensor.head_dim + c] = static_cast<float>(code) * scale + zero;
      }
    }
  }
}

inline void dequantize_record(const RecordFormat& format, Side side, Exponents exponents, const std::uint8_t* record,
                              float* out) {
  visit_arrangement(format.arrangement, [&]<class A>() { dequantize_side<A>(format, side, exponents, record, out); });
}

PackKernels pack_kernels() {
  return {flush_tile, store_rows,        quantize_rows_range, dequantize_rows_range,
          map_heads,  dequantize_record, repack_record};
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu

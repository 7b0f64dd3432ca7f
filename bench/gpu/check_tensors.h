// The operations around the cache against the CPU backend: bytes where both promise the same bytes.
#pragma once

#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "gpu/check_append.h"

namespace skvq::bench {

inline constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBf16};

// Equal bytes, or the first that is not.
inline void check_bytes(Tally& tally, const std::string& what, const DeviceBytes& device, const Bytes& host) {
  const Bytes got = device.download<std::uint8_t>();
  const auto [a, b] = std::mismatch(got.begin(), got.end(), host.begin());
  tally.check(a == got.end(), what, ", byte ", a - got.begin(), ": ", a == got.end() ? 0 : int{*a}, ", not ",
              a == got.end() ? 0 : int{*b});
}
inline Bytes poisoned(std::size_t size) {
  return Bytes(size, kPoison);
}

inline Shape plain_rows(DType dtype, int head_dim) {
  Shape s;
  s.dtype = dtype;
  s.head_dim = head_dim;
  return s;
}

inline void check_quantize_rows(Findings& findings) {
  Tally tally;
  const std::vector<std::int32_t> starts = {0, 5, 37, 38, 128, 300};  // groups of every kind
  const DeviceBytes device_starts(starts);
  const std::vector<float> clip = {1.0f, 0.9f, 0.8f, 1.0f, 0.5f};
  const DeviceBytes device_clip(clip);
  for (const CodeTraits& code : kCodes) {
    for (const DType dtype : kDTypes) {
      for (const Meta meta : {Meta::kE4m3, Meta::kFp16}) {
        QuantizeRowsArgs a{};
        const Bytes x = random_bytes(plain_rows(dtype, 300), 33, 3);
        a.x = x.data();
        a.dtype = dtype;
        a.num_rows = 33;
        a.num_channels = 300;
        a.num_groups = 5;
        for (int g = 0; g < 5; ++g) a.row_bytes += group_row_bytes(code.code, starts[g + 1] - starts[g]);
        a.group_start = starts.data();
        a.clip = {clip.data()};
        a.code = code.code;
        a.meta_type = meta;
        a.exponents = {-2, -1};
        Bytes codes = poisoned(a.num_rows * a.row_bytes), metas = poisoned(a.num_rows * 10 * meta_bytes(meta)),
              decoded = poisoned(a.num_rows * 300 * sizeof(float));
        a.codes = codes.data();
        a.meta = metas.data();
        a.decoded = reinterpret_cast<float*>(decoded.data());
        QuantizeRowsArgs d = a;
        const DeviceBytes device_x(x), device_codes(codes), device_metas(metas), device_decoded(decoded);
        cpu::quantize_rows(a, kPool);
        cpu::dequantize_rows(a, kPool);
        d.x = device_x.bytes();
        d.group_start = device_starts.as<std::int32_t>();
        d.clip = {device_clip.as<float>()};
        d.codes = device_codes.bytes();
        d.meta = device_metas.bytes();
        d.decoded = device_decoded.as<float>();
        cuda::quantize_rows(d, nullptr);
        cuda::dequantize_rows(d, nullptr);
        const std::string name = concat("code ", code.name, " from ", dtype_bytes(dtype), " bytes");
        check_bytes(tally, name + ", codes", device_codes, codes);
        check_bytes(tally, name + ", metadata", device_metas, metas);
        check_bytes(tally, name + ", decoded", device_decoded, decoded);
      }
    }
  }
  findings.add("quantize_rows and dequantize_rows, bytes", tally.ok(), tally.text(), tally.figures());
}

// One map of 7 tokens, 6 heads over 2 KV heads; `parts`: permutation, shift, scale, matrix, share, by bit.
inline void check_one_map(Tally& tally, DType dtype, int head_dim, int parts, bool per_head, bool leave) {
  const std::int64_t tokens = 7;
  const int heads = 6, kv_heads = 2, d = head_dim;
  std::mt19937 generator(9);
  std::normal_distribution<float> normal;
  const auto floats = [&](int count) {
    std::vector<float> x(count);
    for (float& f : x) f = normal(generator);
    return x;
  };
  std::vector<std::int32_t> permutation(kv_heads * d);
  for (int h = 0; h < kv_heads; ++h) {
    const auto begin = permutation.begin() + h * d;
    std::iota(begin, begin + d, 0);
    std::shuffle(begin, begin + d, generator);
  }
  const std::vector<float> shift = floats(kv_heads * d), scale = floats(kv_heads * d),
                           matrix = floats((per_head ? kv_heads : 1) * d * d), share = floats(tokens * heads);
  const Bytes x = random_bytes(plain_rows(dtype, d), tokens * heads, 2);
  Bytes out = poisoned(x.size());
  const DeviceBytes device_permutation(permutation), device_shift(shift), device_scale(scale), device_matrix(matrix),
      device_share(share), device_x(x), device_out(out);
  MapHeadsArgs a{};
  a.x = {x.data(), static_cast<std::int64_t>(heads) * d, d};
  a.dtype = dtype;
  a.num_tokens = tokens;
  a.num_heads = heads;
  a.head_dim = d;
  a.ratio = heads / kv_heads;
  a.matrix_per_head = per_head;
  a.leave = leave;
  a.out = out.data();
  MapHeadsArgs g = a;
  const auto choose = [&](int bit, auto& host, auto& device, const auto& values, const DeviceBytes& memory) {
    if ((parts >> bit & 1) == 0) return;
    host = values.data();
    device = memory.as<std::remove_cvref_t<decltype(values[0])>>();
  };
  choose(0, a.permutation, g.permutation, permutation, device_permutation);
  choose(1, a.shift, g.shift, shift, device_shift);
  choose(2, a.scale, g.scale, scale, device_scale);
  choose(3, a.matrix, g.matrix, matrix, device_matrix);
  if (leave) choose(4, a.share, g.share, share, device_share);
  g.x.data = device_x.bytes();
  g.out = device_out.bytes();
  cpu::map_heads(a, kPool);
  cuda::map_heads(g, nullptr);
  check_bytes(tally, concat(leave ? "leave" : "enter", " d", d, " parts ", parts, " of ", dtype_bytes(dtype), " bytes"),
              device_out, out);
}

inline void check_map_heads(Findings& findings, const CheckOptions& o) {
  Tally tally;
  for (const DType dtype : kDTypes) {
    for (const int head_dim : kHeadDims) {
      if (o.small && head_dim != 80) continue;
      for (int parts = 0; parts < 32; parts += head_dim == 128 ? 1 : 5) {
        for (const bool per_head : {false, true}) {
          for (const bool leave : {false, true}) check_one_map(tally, dtype, head_dim, parts, per_head, leave);
        }
      }
    }
  }
  findings.add("map_heads, bytes", tally.ok(), tally.text(), tally.figures());
}

inline void check_permute(Findings& findings) {
  Tally tally;
  for (const DType dtype : {DType::kF32, DType::kBf16}) {
    for (const int d : kHeadDims) {
      std::vector<std::int32_t> permutation(3 * d);
      for (int h = 0; h < 3; ++h) {
        const auto begin = permutation.begin() + h * d;
        std::iota(begin, begin + d, 0);
        std::shuffle(begin, begin + d, std::mt19937(h));
      }
      const Bytes x = random_bytes(plain_rows(dtype, d), 11 * 3, 4);
      Bytes out = poisoned(x.size());
      const DeviceBytes device_x(x), device_out(out), device_permutation(permutation);
      PermuteArgs a{x.data(), permutation.data(), out.data(), 11, 3, d, dtype_bytes(dtype)};
      cpu::permute_channels(a, kPool);
      a.x = device_x.bytes();
      a.permutation = device_permutation.as<std::int32_t>();
      a.out = device_out.bytes();
      cuda::permute_channels(a, nullptr);
      check_bytes(tally, concat("d", d), device_out, out);
    }
  }
  findings.add("permute_channels, bytes", tally.ok(), tally.text(), tally.figures());
}

// Exponentials differ in the last bits between the libraries, so outputs may differ by one rounding.
inline void check_merge(Findings& findings) {
  Tally tally;
  for (const DType dtype : kDTypes) {
    for (const int d : {64, 80, 128, 512}) {
      const std::int64_t rows = 41;
      const Bytes out_a = random_bytes(plain_rows(dtype, d), rows, 5),
                  out_b = random_bytes(plain_rows(dtype, d), rows, 6);
      std::vector<float> lse_a(rows), lse_b(rows);
      for (std::int64_t i = 0; i < rows; ++i) {
        lse_a[i] = i % 5 == 0 ? -HUGE_VALF : static_cast<float>(i) * 0.7f - 10.0f;
        lse_b[i] = i % 3 == 0 ? -HUGE_VALF : 5.0f - static_cast<float>(i) * 0.3f;
      }
      Bytes out = poisoned(out_a.size());
      std::vector<float> lse(rows, NAN);
      const DeviceBytes da(out_a), db(out_b), la(lse_a), lb(lse_b), device_out(out), device_lse(lse);
      cpu::merge_states(
          {out_a.data(), out_b.data(), lse_a.data(), lse_b.data(), out.data(), lse.data(), rows, d, dtype}, kPool);
      cuda::merge_states({da.bytes(), db.bytes(), la.as<float>(), lb.as<float>(), device_out.bytes(),
                          device_lse.as<float>(), rows, d, dtype},
                         nullptr);
      const Bytes got = device_out.download<std::uint8_t>();
      const std::vector<float> got_lse = device_lse.download<float>();
      const double step = dtype == DType::kF32 ? 0x1p-20 : dtype == DType::kF16 ? 0x1p-10 : 0x1p-7;
      for (std::int64_t i = 0; i < rows * d; ++i) {
        const double x = load_float(dtype, got.data(), i), y = load_float(dtype, out.data(), i);
        tally.check(std::fabs(x - y) <= step * std::fmax(1.0, std::fabs(y)), "element ", i, " is ", x, ", not ", y);
      }
      for (std::int64_t i = 0; i < rows; ++i) {
        const bool same = got_lse[i] == lse[i] || std::fabs(got_lse[i] - lse[i]) <= 1e-5f * std::fabs(lse[i]) + 1e-6f;
        tally.check(same, "lse ", i, " is ", got_lse[i], ", not ", lse[i]);
      }
    }
  }
  findings.add("merge_states, to one rounding", tally.ok(), tally.text(), tally.figures());
}

inline void check_pages(Findings& findings, const CheckOptions& o, cudaStream_t stream) {
  Tally copies, unpacked;
  for (const Scheme& scheme :
       {Scheme{"2", "1.5"}, Scheme{"3:1/2+2", "8"}, Scheme{"1.5", "4"}, Scheme{"1.5fast", "3"}}) {
    for (const int head_dim : {64, 80, 128, 256}) {
      Shape s;
      s.scheme = scheme;
      s.head_dim = head_dim;
      s.group = 64;
      if (!exists(s)) continue;
      Twin twin(s, true);
      NewTokens(s, {s.sinks + s.window + 64 * 7}, 21).append_on_host(twin);
      twin.upload();
      const CacheView &h = twin.host(), &g = twin.device();
      const std::vector<std::int32_t> pages(h.page_table, h.page_table + 7);
      const DeviceBytes device_pages(pages);
      Bytes k = poisoned(std::size_t{7} * kTileTokens * s.row() * sizeof(float)), v = k;
      const DeviceBytes device_k(k), device_v(v);
      cpu::unpack_pages({h.pages, pages.data(), h.exponents, h.format, 7, s.heads, reinterpret_cast<float*>(k.data()),
                         reinterpret_cast<float*>(v.data())},
                        kPool);
      cuda::unpack_pages({g.pages, device_pages.as<std::int32_t>(), g.exponents, g.format, 7, s.heads,
                          device_k.as<float>(), device_v.as<float>()},
                         stream);
      cuda_check(cudaStreamSynchronize(stream), "unpack_pages");
      check_bytes(unpacked, s.text() + " K", device_k, k);
      check_bytes(unpacked, s.text() + " V", device_v, v);
      const std::int64_t page_bytes = static_cast<std::int64_t>(s.heads) * h.format.record_bytes();
      cpu::copy_pages({h.pages, pages.data(), pages.data() + 3, 3, page_bytes}, kPool);
      cuda::copy_pages({g.pages, device_pages.as<std::int32_t>(), device_pages.as<std::int32_t>() + 3, 3, page_bytes},
                       stream);
      cuda_check(cudaStreamSynchronize(stream), "copy_pages");
      const std::string difference = twin.difference();
      copies.check(difference.empty(), s.text(), ": ", difference);
      if (o.small) break;
    }
  }
  findings.add("unpack_pages, bytes", unpacked.ok(), unpacked.text(), unpacked.figures());
  findings.add("copy_pages, bytes", copies.ok(), copies.text(), copies.figures());
}

inline void check_tensors(Findings& findings, const CheckOptions& o, cudaStream_t stream) {
  check_quantize_rows(findings);
  check_map_heads(findings, o);
  check_permute(findings);
  check_merge(findings);
  check_pages(findings, o, stream);
}

}  // namespace skvq::bench

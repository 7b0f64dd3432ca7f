// cuda::decode_attention against sums in double, for every kernel that was built.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include "gpu/check_append.h"
#include "gpu/reference.h"

namespace skvq::bench {

// Shapes of the lines of cuda::decode_instances(): "k2-v1.5-g128 at head_dim 128".
inline std::vector<Shape> built_shapes() {
  std::vector<Shape> shapes;
  std::istringstream lines(cuda::decode_instances());
  for (std::string line; std::getline(lines, line);) {
    const std::size_t group = line.rfind("-g"), dim = line.find(" at head_dim ");
    if (group == std::string::npos || dim == std::string::npos || dim < group) {
      throw std::runtime_error(concat("decode_instances() says \"", line, "\"; expected SCHEME-gGROUP at head_dim N"));
    }
    Shape s;
    s.scheme = parse_scheme(line.substr(0, group));
    s.group = parse_number("decode_instances()", line.substr(group + 2, dim - group - 2));
    s.head_dim = parse_number("decode_instances()", line.substr(dim + 13));
    if (s.group != 32 && s.group != 64 && s.group != 128) s.group = 0;
    shapes.push_back(s);
  }
  return shapes;
}

// Two of the built ones for checks that need not see them all.
inline std::vector<Shape> typical_shapes() {
  const std::vector<Shape> all = built_shapes();
  if (all.empty()) throw std::runtime_error("decode_instances() lists no kernel: nothing can be checked");
  std::vector<Shape> typical;
  for (const Shape& s : all) {
    if (s.head_dim == 128 && s.group == 128 && typical.size() < 2) typical.push_back(s);
  }
  return typical.empty() ? std::vector<Shape>{all.front()} : typical;
}

// What the queries of a call are.
struct Questions {
  const char* name = "one query";
  int ratio = 4, q_len = 1;
  bool ragged = true, in_cache = true;
  int sliding_window = 0;
  float softcap = 0.0f;
  bool learned_sinks = false, shift = false;
};

// A call on both sides: queries, options, outputs.
class DecodePair {
 public:
  DecodePair(const Twin& twin, const Questions& ask, unsigned seed) {
    const Shape& s = twin.shape();
    cu_seqlens_ = {0};
    for (const int length : twin.lengths()) {
      const int count = !ask.ragged || !ask.in_cache ? ask.q_len : std::min(ask.q_len, length);
      cu_seqlens_.push_back(cu_seqlens_.back() + count);
    }
    const std::int64_t tokens = cu_seqlens_.back(), heads = static_cast<std::int64_t>(s.heads) * ask.ratio;
    q_ = random_bytes(s, tokens * heads, seed);
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (int i = 0; i < heads; ++i) sinks_.push_back(normal(generator));
    for (std::int64_t i = 0; i < tokens * heads; ++i) shift_.push_back(3.0f * normal(generator));
    host_.cache = twin.host();
    host_.q = {q_.data(), heads * s.head_dim, s.head_dim};
    host_.queries = {ask.ragged ? cu_seqlens_.data() : nullptr, tokens, s.batch};
    host_.q_dtype = s.dtype;
    host_.num_q_heads = static_cast<int>(heads);
    host_.softmax_scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
    host_.softcap = ask.softcap;
    host_.sliding_window = ask.sliding_window;
    host_.exact = true;
    host_.queries_in_cache = ask.in_cache;
    host_.learned_sinks = ask.learned_sinks ? sinks_.data() : nullptr;
    host_.logit_shift = ask.shift ? shift_.data() : nullptr;
    bring_to_device(twin);
  }
  const DecodeArgs& host() const { return host_; }

  // Outputs and workspace hold NaN before.
  void run(bool poison, cudaStream_t stream) {
    if (poison) {
      for (const DeviceBytes* memory : {&device_out_, &device_lse_, &workspace_}) {
        if (memory->size() > 0) memory->fill(kPoison);
      }
    }
    enqueue(stream);
    cuda_check(cudaStreamSynchronize(stream), "decode_attention");
  }
  void enqueue(cudaStream_t stream) const { cuda::decode_attention(device_, workspace_.bytes(), stream); }
  Bytes out() const { return device_out_.download<std::uint8_t>(); }
  std::vector<float> lse() const { return device_lse_.download<float>(); }

 private:
  void bring_to_device(const Twin& twin) {
    device_ = host_;
    device_.cache = twin.device();
    device_q_ = DeviceBytes(q_);
    device_cu_seqlens_ = DeviceBytes(cu_seqlens_);
    device_sinks_ = DeviceBytes(sinks_);
    device_shift_ = DeviceBytes(shift_);
    device_out_ = DeviceBytes(q_.size());
    device_lse_ = DeviceBytes(host_.queries.num_tokens * host_.num_q_heads * sizeof(float));
    device_.q.data = device_q_.bytes();
    if (host_.queries.cu_seqlens) device_.queries.cu_seqlens = device_cu_seqlens_.as<std::int32_t>();
    if (host_.learned_sinks) device_.learned_sinks = device_sinks_.as<float>();
    if (host_.logit_shift) device_.logit_shift = device_shift_.as<float>();
    device_.out = device_out_.bytes();
    device_.lse = device_lse_.as<float>();
    workspace_ = DeviceBytes(cuda::decode_workspace_bytes(device_));
  }

  std::vector<std::int32_t> cu_seqlens_;
  Bytes q_;
  std::vector<float> sinks_, shift_;
  DecodeArgs host_{}, device_{};
  DeviceBytes device_q_, device_cu_seqlens_, device_sinks_, device_shift_, device_out_, device_lse_, workspace_;
};

// Largest errors as shares of what is allowed; above 1 is wrong.
struct DecodeErrors {
  double out = 0.0, lse = 0.0;
  std::string first;  // what is wrong beyond numbers

  bool ok() const { return first.empty() && out <= 1.0 && lse <= 1.0; }
  std::string text() const {
    return first.empty() ? concat("error of out and lse / allowed ", out, " and ", lse) : first;
  }
};

inline DecodeErrors compare(const DecodePair& pair) {
  const DecodeArgs& a = pair.host();
  const Attention want = attend(a, [](double x) { return x; });
  const Tolerance allowed = tolerance(a, want);
  const Bytes out = pair.out();
  const std::vector<float> lse = pair.lse();
  const int d = a.cache.head_dim;
  DecodeErrors errors;
  for (std::size_t row = 0; row < want.lse.size(); ++row) {
    const std::size_t token = row / a.num_q_heads;
    const bool nothing = want.lse[row] == -HUGE_VAL;
    if (nothing && lse[row] != -HUGE_VALF) errors.first = concat("row ", row, " sees nothing and has lse ", lse[row]);
    if (!nothing) errors.lse = std::fmax(errors.lse, std::fabs(lse[row] - want.lse[row]) / allowed.lse[token]);
    if (std::isnan(lse[row])) errors.first = concat("lse of row ", row, " is NaN");
    for (int c = 0; c < d; ++c) {
      const std::size_t at = row * d + c;
      const double got = load_float(a.q_dtype, out.data(), static_cast<std::int64_t>(at));
      if (std::isnan(got)) errors.first = concat("row ", row, " channel ", c, " is NaN");
      if (nothing && got != 0.0) errors.first = concat("row ", row, " sees nothing and has ", got);
      errors.out = std::fmax(errors.out, std::fabs(got - want.out[at]) / allowed.out[token]);
    }
  }
  return errors;
}

// Fills a cache with sequences of the edge lengths.
inline void fill_edges(Twin& twin, const CheckOptions& o, const std::vector<int>& lengths, cudaStream_t stream) {
  const NewTokens tokens(twin.shape(), lengths, 11);
  if (o.poison) {  // the CPU's bytes, so that only decode is checked
    tokens.append_on_host(twin);
    twin.upload();
  } else {
    tokens.append(twin, stream);
  }
}

inline DecodeErrors decode_errors(Shape s, const Questions& ask, const CheckOptions& o, cudaStream_t stream) {
  std::vector<int> lengths = edge_lengths(s);
  if (!ask.ragged && ask.in_cache) std::erase_if(lengths, [&](int n) { return n < ask.q_len; });
  s.batch = static_cast<int>(lengths.size());
  Twin twin(s, o.poison);
  fill_edges(twin, o, lengths, stream);
  DecodePair pair(twin, ask, 5);
  pair.run(o.poison, stream);
  DecodeErrors errors = compare(pair);
  const Bytes first = pair.out();
  for (int again = 0; again < 3 && errors.first.empty(); ++again) {
    pair.run(o.poison, stream);
    if (pair.out() != first) errors.first = "the same call gave other bytes when it was repeated";
  }
  return errors;
}

inline std::vector<Questions> plain_questions() {
  return {{}, {"four queries, MHA", 1, 4}, {"ratio 8, equal lengths", 8, 2, false}, {"ratio 7", 7, 1}};
}
inline std::vector<Questions> special_questions() {
  return {{"queries behind the cache", 4, 3, true, false},
          {"sliding window", 4, 2, true, true, 50},
          {"sliding window of one token", 2, 1, true, true, 1},
          {"softcap", 4, 1, true, true, 0, 2.0f},
          {"learned sinks", 4, 2, true, true, 0, 0.0f, true},
          {"logit shift", 4, 1, true, true, 0, 0.0f, false, true},
          {"everything", 5, 3, true, true, 90, 5.0f, true, true},
          {"ratio 71", 71, 1},
          {"64 queries", 4, 17, false}};
}

// One finding for each kernel, and one for each special kind of question on two of them.
inline void check_decode(Findings& findings, const CheckOptions& o, cudaStream_t stream) {
  const auto check_one = [&](Tally& tally, double& worst, const Shape& s, const Questions& ask) {
    const DecodeErrors errors = decode_errors(s, ask, o, stream);
    worst = std::max({worst, errors.out, errors.lse});
    tally.check(errors.ok(), s.text(), ", ", ask.name, ": ", errors.text());
  };
  const auto add = [&](const std::string& name, const Tally& tally, double worst) {
    findings.add(name, tally.ok(), concat(tally.text(), ", largest error / allowed ", worst),
                 tally.figures().add("largest_error_of_allowed", worst));
  };
  const std::vector<Shape> shapes = built_shapes();
  for (Shape s : shapes) {
    if (o.small && s.head_dim > 128) continue;
    Tally tally;
    double worst = 0.0;
    for (const DType dtype : {DType::kBf16, DType::kF16}) {
      s.dtype = dtype;
      s.meta = dtype == DType::kBf16 ? "fp8" : "fp16";
      for (const Questions& ask : plain_questions()) {
        if (!o.small || (dtype == DType::kBf16 && ask.q_len < 4)) check_one(tally, worst, s, ask);
      }
    }
    add(concat("decode k", s.scheme.k, "-v", s.scheme.v, "-g", s.group, " d", s.head_dim), tally, worst);
  }
  std::vector<Shape> typical = typical_shapes();
  if (o.small) typical.resize(1);
  for (const Questions& ask : special_questions()) {
    Tally tally;
    double worst = 0.0;
    for (const DType dtype : {DType::kBf16, DType::kF16}) {
      if (o.small && dtype == DType::kF16) continue;
      for (Shape s : typical) {
        s.dtype = dtype;
        check_one(tally, worst, s, ask);
      }
    }
    add(concat("decode, ", ask.name), tally, worst);
  }
}

}  // namespace skvq::bench

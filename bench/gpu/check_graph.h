// One CUDA graph of a step, replayed while sequences grow over the borders of tiles.
#pragma once

#include <string>
#include <vector>

#include "gpu/check_decode.h"

namespace skvq::bench {

// Appends a token to every sequence and attends, first as a graph; the graph's outputs must be those of plain calls.
inline void check_graph(Findings& findings, const CheckOptions& o, const Stream& stream) {
  Tally tally;
  double worst = 0.0;
  Shape s = typical_shapes().front();
  const std::vector<int> lengths = {0, 3, s.sinks + s.window + 60, s.sinks + s.window + 63, 250};
  s.batch = static_cast<int>(lengths.size());
  Twin twin(s, true);
  fill_edges(twin, o, lengths, stream);
  const auto rows = static_cast<std::int64_t>(s.batch) * s.heads;
  const DeviceBytes k(random_bytes(s, rows, 1)), v(random_bytes(s, rows, 2));
  const AppendArgs append = twin.device_append(k.bytes(), v.bytes(), {nullptr, s.batch, s.batch});
  Questions ask;
  ask.ragged = false;
  DecodePair pair(twin, ask, 3);
  cuda::append(append, stream);  // what a first call does once must not be captured
  pair.run(true, stream);
  twin.upload();
  const Graph graph(stream, [&] {
    cuda::append(append, stream);
    pair.enqueue(stream);
  });
  const int steps = o.small ? 3 : 140;
  for (int step = 0; step < steps; ++step) {
    const Bytes new_k = random_bytes(s, rows, 100 + step), new_v = random_bytes(s, rows, 900 + step);
    k.upload(new_k);
    v.upload(new_v);
    cpu::append(twin.host_append(new_k.data(), new_v.data(), {nullptr, s.batch, s.batch}), kPool);
    graph.launch(stream);
    stream.synchronize();
    const std::string difference = twin.difference();
    tally.check(difference.empty(), "step ", step, ": ", difference);
    const Bytes out = pair.out();
    if (step % 20 == 0 || step + 1 == steps) {
      const DecodeErrors errors = compare(pair);
      worst = std::max({worst, errors.out, errors.lse});
      tally.check(errors.ok(), "step ", step, ": ", errors.text());
    }
    pair.run(true, stream);
    tally.check(pair.out() == out, "step ", step, ": a plain call gave other bytes than the graph");
  }
  findings.add("one graph over growing lengths", tally.ok(), concat(tally.text(), ", largest error / allowed ", worst),
               tally.figures());
}

}  // namespace skvq::bench

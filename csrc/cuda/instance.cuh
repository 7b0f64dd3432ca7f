// A decode kernel that was built, and how to launch it. csrc/cuda/instances/ holds the list.
#pragma once

#include <vector>

#include "cuda/decode_kernel.cuh"
#include "cuda/launch.cuh"

namespace skvq::cuda {

struct DecodeInstance {
  RecordFormat format;
  int warps, stages, blocks_per_multiprocessor;
  void (*attend)(const DecodeParams& params, std::size_t shared_bytes, Stream stream);
};
using InstanceList = std::vector<DecodeInstance>;

template <class T>
void add(InstanceList& list) {
  list.push_back({T::kFormat, T::kWarps, T::kStages, T::kBlocksPerMultiprocessor,
                  [](const DecodeParams& params, std::size_t shared_bytes, Stream stream) {
                    launch("attend_kernel", attend_kernel<T>, {params.blocks}, T::kThreads, shared_bytes, stream,
                           params);
                  }});
}

using K8 = Uniform<Code::kInt8>;
using K4 = Uniform<Code::kInt4>;
using K3 = Uniform<Code::kInt3>;
using K2 = Uniform<Code::kInt2>;
using K3Half2 = Bands<Code::kInt3, 1, 2, Code::kInt2>;
using K4Quarter2 = Bands<Code::kInt4, 1, 4, Code::kInt2>;
using V4 = Uniform<Code::kInt4>;
using V2 = Uniform<Code::kInt2>;
using V1_5 = Uniform<Code::kTernary>;

}  // namespace skvq::cuda

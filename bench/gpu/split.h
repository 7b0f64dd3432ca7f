// The time of each kernel of an operation: a graph of many calls in which all other kernels are switched off.
#pragma once

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "gpu/pass_timer.h"
#include "json.h"

namespace skvq::bench {

struct KernelShare {
  std::string name;
  dim3 grid, block;
  unsigned dynamic_shared = 0;
  int registers = 0;
  std::size_t local_bytes = 0;
  std::vector<cudaGraphNode_t> nodes;
  GpuTiming time{};  // of all launches of this kernel in one call
};

// The name of a function without namespaces, parameters and template arguments.
inline std::string short_name(const char* mangled) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> demangled(abi::__cxa_demangle(mangled, nullptr, nullptr, &status),
                                                              std::free);
  std::string name = status == 0 ? demangled.get() : mangled;
  name = name.substr(0, name.find_first_of("<("));
  const std::size_t space = name.rfind(' '), scope = name.rfind("::");
  if (space != std::string::npos && (scope == std::string::npos || scope < space)) return name.substr(space + 1);
  return scope == std::string::npos ? name : name.substr(scope + 2);
}

inline KernelShare describe_node(cudaGraphNode_t node) {
  cudaGraphNodeType type{};
  cuda_check(cudaGraphNodeGetType(node, &type), "asking for the type of a node");
  KernelShare share;
  if (type != cudaGraphNodeTypeKernel) {
    share.name = type == cudaGraphNodeTypeMemset ? "memset" : type == cudaGraphNodeTypeMemcpy ? "memcpy" : "other";
    return share;
  }
  cudaKernelNodeParams params{};
  cudaFuncAttributes attributes{};
  const char* name = nullptr;
  cuda_check(cudaGraphKernelNodeGetParams(node, &params), "reading a kernel of a graph");
  cuda_check(cudaFuncGetAttributes(&attributes, params.func), "reading the attributes of a kernel");
  cuda_check(cudaFuncGetName(&name, params.func), "asking for the name of a kernel");
  share.name = short_name(name);
  share.grid = params.gridDim;
  share.block = params.blockDim;
  share.dynamic_shared = params.sharedMemBytes;
  share.registers = attributes.numRegs;
  share.local_bytes = attributes.localSizeBytes;
  return share;
}

// Kernels of `graph`, which holds `calls` calls, in the order of their first launch; `prepare` as in PassTimer.
template <class Prepare>
std::vector<KernelShare> split_kernels(const Graph& graph, const PassTimer& timer, cudaStream_t stream,
                                       const Passes& passes, Prepare&& prepare, int calls) {
  std::vector<KernelShare> shares;
  for (const cudaGraphNode_t node : graph.nodes()) {
    KernelShare share = describe_node(node);
    if (share.name == "other") continue;
    const auto same = std::find_if(shares.begin(), shares.end(), [&](const KernelShare& s) {
      return s.name == share.name && s.grid.x == share.grid.x && s.grid.y == share.grid.y;
    });
    KernelShare& of = same != shares.end() ? *same : shares.emplace_back(std::move(share));
    of.nodes.push_back(node);
  }
  const auto enable = [&](const KernelShare& share, bool enabled) {
    for (const cudaGraphNode_t node : share.nodes) graph.enable(node, enabled);
  };
  for (KernelShare& timed : shares) {
    for (const KernelShare& share : shares) enable(share, &share == &timed);
    timed.time = timer.time(passes, prepare, [&](int) { graph.launch(stream); });
    timed.time.device.min_s /= calls;
    timed.time.device.median_s /= calls;
  }
  for (const KernelShare& share : shares) enable(share, true);
  return shares;
}

inline Json to_json(const KernelShare& s, int calls) {
  return Json()
      .add("name", s.name)
      .add("launches_per_call", static_cast<double>(s.nodes.size()) / calls)
      .add("blocks", concat(s.grid.x, " x ", s.grid.y))
      .add("threads", s.block.x)
      .add("dynamic_shared_bytes", s.dynamic_shared)
      .add("registers", s.registers)
      .add("local_bytes", s.local_bytes)
      .add("min_s", s.time.device.min_s)
      .add("median_s", s.time.device.median_s);
}

}  // namespace skvq::bench

// Device memory, streams, events and graphs that free themselves; every failure of the runtime is an exception.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/format_text.h"

namespace skvq::bench {

inline void cuda_check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next check would report it again
  throw std::runtime_error(concat(what, " failed: ", cudaGetErrorString(error)));
}

// Calls `Free` once for what it holds.
template <class Handle, auto Free>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle handle) : handle_(handle) {}
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, Handle{})) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_) (void)Free(handle_);
  }
  Handle get() const { return handle_; }

 private:
  Handle handle_{};
};

class DeviceBytes {
 public:
  DeviceBytes() = default;
  explicit DeviceBytes(std::size_t size) : size_(size) {
    void* data = nullptr;
    if (size > 0) cuda_check(cudaMalloc(&data, size), "allocating device memory");
    data_ = Owned<void*, cudaFree>(data);
  }
  template <class T>
  explicit DeviceBytes(const std::vector<T>& host) : DeviceBytes(host.size() * sizeof(T)) {
    upload(host);
  }

  std::size_t size() const { return size_; }
  std::uint8_t* bytes() const { return static_cast<std::uint8_t*>(data_.get()); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }
  void fill(int byte) const { cuda_check(cudaMemset(data_.get(), byte, size_), "filling device memory"); }
  template <class T>
  void upload(const std::vector<T>& host) const {
    cuda_check(cudaMemcpy(data_.get(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
               "copying to the device");
  }
  template <class T>
  std::vector<T> download() const {
    std::vector<T> host(size_ / sizeof(T));
    cuda_check(cudaMemcpy(host.data(), data_.get(), size_, cudaMemcpyDeviceToHost), "copying from the device");
    return host;
  }

 private:
  Owned<void*, cudaFree> data_;
  std::size_t size_ = 0;
};

class Stream {
 public:
  Stream() {
    cudaStream_t stream = nullptr;
    cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    stream_ = Owned<cudaStream_t, cudaStreamDestroy>(stream);
  }
  operator cudaStream_t() const { return stream_.get(); }
  void synchronize() const { cuda_check(cudaStreamSynchronize(stream_.get()), "waiting for the device"); }

 private:
  Owned<cudaStream_t, cudaStreamDestroy> stream_;
};

class Event {
 public:
  Event() {
    cudaEvent_t event = nullptr;
    cuda_check(cudaEventCreate(&event), "making an event");
    event_ = Owned<cudaEvent_t, cudaEventDestroy>(event);
  }
  void record(cudaStream_t stream) const { cuda_check(cudaEventRecord(event_.get(), stream), "recording an event"); }
  double seconds_since(const Event& start) const {
    float milliseconds = 0.0f;
    cuda_check(cudaEventSynchronize(event_.get()), "waiting for an event");
    cuda_check(cudaEventElapsedTime(&milliseconds, start.event_.get(), event_.get()), "reading events");
    return 1e-3 * milliseconds;
  }

 private:
  Owned<cudaEvent_t, cudaEventDestroy> event_;
};

// What `enqueue` puts on the stream, to be launched as one.
class Graph {
 public:
  template <class Enqueue>
  Graph(cudaStream_t stream, Enqueue&& enqueue) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "beginning to capture");
    try {
      enqueue();
    } catch (...) {
      (void)cudaStreamEndCapture(stream, &graph);
      graph_ = Owned<cudaGraph_t, cudaGraphDestroy>(graph);
      throw;
    }
    cuda_check(cudaStreamEndCapture(stream, &graph), "capturing a graph");
    graph_ = Owned<cudaGraph_t, cudaGraphDestroy>(graph);
    cuda_check(cudaGraphInstantiate(&exec, graph, 0), "instantiating a graph");
    exec_ = Owned<cudaGraphExec_t, cudaGraphExecDestroy>(exec);
    cuda_check(cudaGraphUpload(exec, stream), "uploading a graph");
  }
  void launch(cudaStream_t stream) const { cuda_check(cudaGraphLaunch(exec_.get(), stream), "launching a graph"); }

  std::vector<cudaGraphNode_t> nodes() const {
    std::size_t count = 0;
    cuda_check(cudaGraphGetNodes(graph_.get(), nullptr, &count), "counting the nodes of a graph");
    std::vector<cudaGraphNode_t> nodes(count);
    if (count > 0) cuda_check(cudaGraphGetNodes(graph_.get(), nodes.data(), &count), "listing the nodes of a graph");
    return nodes;
  }
  void enable(cudaGraphNode_t node, bool enabled) const {
    cuda_check(cudaGraphNodeSetEnabled(exec_.get(), node, enabled), "switching a node of a graph");
  }

 private:
  Owned<cudaGraph_t, cudaGraphDestroy> graph_;
  Owned<cudaGraphExec_t, cudaGraphExecDestroy> exec_;
};

}  // namespace skvq::bench

// The functions of cuda/cuda.h for ctypes: an error is a text, success is null.
#include <exception>
#include <string>

#include "cuda/cuda.h"

namespace {

template <class F>
const char* guarded(F&& call) {
  static thread_local std::string message;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

const char* ptx_append(const skvq::AppendArgs* args) {
  return guarded([&] { skvq::cuda::append(*args, nullptr); });
}
const char* ptx_decode_workspace_bytes(const skvq::DecodeArgs* args, std::size_t* bytes) {
  return guarded([&] { *bytes = skvq::cuda::decode_workspace_bytes(*args); });
}
const char* ptx_decode_attention(const skvq::DecodeArgs* args, void* workspace) {
  return guarded([&] { skvq::cuda::decode_attention(*args, workspace, nullptr); });
}

}  // extern "C"

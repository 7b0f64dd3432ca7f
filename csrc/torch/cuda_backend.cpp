// The kernels of csrc/cuda on torch's current stream. With SKVQ_SIMT the emulator runs the same kernels on tensors of
// the CPU, in place of csrc/cpu: for tests on machines without a GPU.
#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#include <sstream>
#include <stdexcept>

#include "build_info.h"
#include "core/format_text.h"
#include "cuda/cuda.h"
#include "torch/backend.h"

#if !defined(SKVQ_SIMT)
// Absent in a CPU build of torch, where the same binary must load.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace skvq::ops {
namespace {

#if defined(SKVQ_SIMT)

constexpr const char* kArchs = "emulated";

struct OnDevice {
  explicit OnDevice(const Place&) {}
  cuda::Stream stream = nullptr;
};

#else

constexpr const char* kArchs = SKVQ_CUDA_ARCHS;

// Asks once per device whether the binary has kernels for it.
void check_device_once(std::int32_t index) {
  static std::atomic<std::uint64_t> checked{0};
  const std::uint64_t bit = std::uint64_t{1} << (index & 63);
  if (checked.load(std::memory_order_relaxed) & bit) return;
  cuda::check_device();
  checked.fetch_or(bit, std::memory_order_relaxed);
}

// The device of the tensors is the current one while this lives.
class OnDevice {
 public:
  explicit OnDevice(const Place& place) : guard_(place.index) {
    if (aoti_torch_get_current_cuda_stream == nullptr) {
      throw std::runtime_error("this PyTorch was built without CUDA; install a build of it for CUDA");
    }
    check_device_once(place.index);
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place.index, &current));
    stream = static_cast<cuda::Stream>(current);
  }

  cuda::Stream stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

template <class Args, void (*Function)(const Args&, cuda::Stream)>
void run(const Args& args, const Place& place) {
  const OnDevice device(place);
  Function(args, device.stream);
}

constexpr Backend kBackend{
    .arrangement = ArrangementKind::kMma,
    .alignment = 16,
    .append = run<AppendArgs, cuda::append>,
    .check_decode_format = cuda::check_decode_format,
    .decode_workspace_bytes =
        [](const DecodeArgs& args, const Place& place) {
          const OnDevice device(place);
          return cuda::decode_workspace_bytes(args);
        },
    .decode_attention =
        [](const DecodeArgs& args, void* workspace, const Place& place) {
          const OnDevice device(place);
          cuda::decode_attention(args, workspace, device.stream);
        },
    .map_heads = run<MapHeadsArgs, cuda::map_heads>,
    .permute_channels = run<PermuteArgs, cuda::permute_channels>,
    .quantize_rows = run<QuantizeRowsArgs, cuda::quantize_rows>,
    .dequantize_rows = run<QuantizeRowsArgs, cuda::dequantize_rows>,
    .merge_states = run<MergeArgs, cuda::merge_states>,
    .copy_pages = run<CopyPagesArgs, cuda::copy_pages>,
    .unpack_pages = run<UnpackPagesArgs, cuda::unpack_pages>,
};

// The lines of `text` as JSON strings.
std::string json_list(const std::string& text) {
  std::istringstream lines(text);
  std::string list, line;
  while (std::getline(lines, line)) list += concat(list.empty() ? "" : ", ", '"', line, '"');
  return "[" + list + "]";
}

}  // namespace

std::string cuda_json() {
  return concat("{\"archs\": \"", kArchs, "\", \"instances\": ", json_list(cuda::decode_instances()), "}");
}

#if defined(SKVQ_SIMT)
const Backend& cpu_backend() {
  return kBackend;
}
#else
const Backend& cuda_backend() {
  return kBackend;
}
#endif

}  // namespace skvq::ops

// What a GPU's tensors meet in a build without CUDA kernels.
#include <stdexcept>

#include "build_info.h"
#include "core/format_text.h"
#include "torch/backend.h"

namespace skvq::ops {

const Backend& cuda_backend() {
  throw std::runtime_error(
      concat("this build of skvq_ext has no CUDA kernels (", SKVQ_CUDA_REASON,
             "); install the CUDA toolkit, set CUDA_HOME to it and rebuild with SKVQ_CUDA=1, which fails loudly where "
             "something is missing: SKVQ_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."));
}

#if !defined(SKVQ_SIMT)
std::string cuda_json() {
  return "null";
}
#endif

}  // namespace skvq::ops

// The smallest decode kernel, in a file of its own: it is compiled again with each deliberate mistake.
#include "cuda/instance.cuh"

namespace skvq::cuda {

void ptx_small_instance(InstanceList& list) {
  add<Instance<64, 64, K2, V2>>(list);
}

}  // namespace skvq::cuda

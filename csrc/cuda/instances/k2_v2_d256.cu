#include "cuda/instance.cuh"

namespace skvq::cuda {

void k2_v2_d256(InstanceList& list) {
  add<Instance<256, 32, K2, V2>>(list);
  add<Instance<256, 64, K2, V2>>(list);
  add<Instance<256, 128, K2, V2>>(list);
}

}  // namespace skvq::cuda

#include "cuda/instance.cuh"

namespace skvq::cuda {

void k2_v1_5_d256(InstanceList& list) {
  add<Instance<256, 32, K2, V1_5>>(list);
  add<Instance<256, 64, K2, V1_5>>(list);
  add<Instance<256, 128, K2, V1_5>>(list);
}

}  // namespace skvq::cuda

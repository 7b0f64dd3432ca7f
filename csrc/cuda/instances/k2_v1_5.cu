#include "cuda/instance.cuh"

namespace skvq::cuda {

void k2_v1_5(InstanceList& list) {
  add<Instance<64, 32, K2, V1_5>>(list);
  add<Instance<64, 64, K2, V1_5>>(list);
  add<Instance<128, 32, K2, V1_5>>(list);
  add<Instance<128, 64, K2, V1_5>>(list);
  add<Instance<128, 128, K2, V1_5>>(list);
}

}  // namespace skvq::cuda

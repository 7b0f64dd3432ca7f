// All code paths of the decode kernel in few instances: every code, one band and two, one group and several.
#include "cuda/instance.cuh"

namespace skvq::cuda {

void few(InstanceList& list) {
  add<Instance<128, 128, K2, V1_5>>(list);
  add<Instance<64, 32, K4, V4>>(list);
  add<Instance<64, 64, K3Half2, V1_5>>(list);
  add<Instance<128, 64, K8, V4>>(list);
}

}  // namespace skvq::cuda

#include "cuda/instance.cuh"

namespace skvq::cuda {

void k3(InstanceList& list) {
  add<Instance<128, 32, K3, V2>>(list);
  add<Instance<128, 64, K3, V2>>(list);
  add<Instance<128, 128, K3, V2>>(list);
  add<Instance<128, 32, K3, V1_5>>(list);
  add<Instance<128, 64, K3, V1_5>>(list);
  add<Instance<128, 128, K3, V1_5>>(list);
}

}  // namespace skvq::cuda

#include "cuda/instance.cuh"

namespace skvq::cuda {

void bands_3_2(InstanceList& list) {
  add<Instance<64, 64, K3Half2, V1_5>>(list);
  add<Instance<128, 64, K3Half2, V1_5>>(list);
  add<Instance<128, 128, K3Half2, V1_5>>(list);
  add<Instance<256, 128, K3Half2, V1_5>>(list);
}

}  // namespace skvq::cuda

#include "cuda/instance.cuh"

namespace skvq::cuda {

void k4_k8(InstanceList& list) {
  add<Instance<128, 32, K4, V2>>(list);
  add<Instance<128, 64, K4, V2>>(list);
  add<Instance<128, 128, K4, V2>>(list);
  add<Instance<128, 32, K8, V4>>(list);
  add<Instance<128, 64, K8, V4>>(list);
  add<Instance<128, 128, K8, V4>>(list);
}

}  // namespace skvq::cuda

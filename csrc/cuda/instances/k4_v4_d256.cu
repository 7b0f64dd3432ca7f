#include "cuda/instance.cuh"

namespace skvq::cuda {

void k4_v4_d256(InstanceList& list) {
  add<Instance<256, 32, K4, V4>>(list);
  add<Instance<256, 64, K4, V4>>(list);
  add<Instance<256, 128, K4, V4>>(list);
}

}  // namespace skvq::cuda

#include "cuda/instance.cuh"

namespace skvq::cuda {

void k4_v4(InstanceList& list) {
  add<Instance<64, 32, K4, V4>>(list);
  add<Instance<64, 64, K4, V4>>(list);
  add<Instance<128, 32, K4, V4>>(list);
  add<Instance<128, 64, K4, V4>>(list);
  add<Instance<128, 128, K4, V4>>(list);
}

}  // namespace skvq::cuda

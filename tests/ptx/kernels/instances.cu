// A decode kernel for every way of reading codes, at head_dims that keep them small: what tests/test_ptx.py runs.
#include "cuda/instance.cuh"

namespace skvq::cuda {

void ptx_instances(InstanceList& list) {
  add<Instance<128, 128, K2, V1_5>>(list);
  add<Instance<64, 32, K4, V4>>(list);
  add<Instance<64, 64, K3Half2, V2>>(list);
}

}  // namespace skvq::cuda

// The instance that the shared cases use where they do not ask for another.
#include "cuda/instance.cuh"

namespace skvq::cuda {

void one(InstanceList& list) {
  add<Instance<128, 128, K2, V1_5>>(list);
}

}  // namespace skvq::cuda

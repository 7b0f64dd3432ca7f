// The files of this folder, each with a function that adds its instances: the support matrix of the decode kernel.
// A new instance is one line in one of them; a new file (at most six instances each, they take long to compile) one
// here.
#pragma once

#define SKVQ_INSTANCE_FILES(X) \
  X(k2_v2)                     \
  X(k2_v2_d256)                \
  X(k2_v1_5)                   \
  X(k2_v1_5_d256)              \
  X(k4_v4)                     \
  X(k4_v4_d256)                \
  X(k3)                        \
  X(k4_k8)                     \
  X(bands_3_2)                 \
  X(bands_4_2)

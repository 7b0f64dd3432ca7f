// Stands before csrc/cuda/instances/list.h when decode.cu is compiled for the interpreter: the instances in
// tests/ptx/kernels instead of all.
#pragma once

#define SKVQ_INSTANCE_FILES(X) \
  X(ptx_instances)             \
  X(ptx_small_instance)

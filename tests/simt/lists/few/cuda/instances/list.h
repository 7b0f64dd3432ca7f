// Instead of csrc/cuda/instances/list.h: builds with sanitizers take long to compile.
#pragma once

#define SKVQ_INSTANCE_FILES(X) X(few)

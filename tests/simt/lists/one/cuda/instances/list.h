// Instead of csrc/cuda/instances/list.h: planted faults are compiled again for each of them.
#pragma once

#define SKVQ_INSTANCE_FILES(X) X(one)

#include "cpu/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace skvq::cpu {

// One line for each instruction set that CMake builds pack.cpp and attend.cpp for.
#define SKVQ_DECLARE(isa)         \
  namespace isa {                 \
  PackKernels pack_kernels();     \
  AttendKernels attend_kernels(); \
  }
SKVQ_DECLARE(portable)
#if defined(__x86_64__)
SKVQ_DECLARE(avx2)
SKVQ_DECLARE(avx512)
#endif
#undef SKVQ_DECLARE

namespace {

struct Candidate {
  const char* name;
  bool supported;
  Kernels (*make)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
#endif

// Best first.
std::vector<Candidate> candidates() {
  return {
#if defined(__x86_64__)
      {"avx512", has_avx512(), [] { return Kernels{"avx512", avx512::pack_kernels(), avx512::attend_kernels()}; }},
      {"avx2", has_avx2(), [] { return Kernels{"avx2", avx2::pack_kernels(), avx2::attend_kernels()}; }},
#endif
      {"portable", true, [] { return Kernels{"portable", portable::pack_kernels(), portable::attend_kernels()}; }},
  };
}

Kernels choose() {
  const char* asked = std::getenv("SKVQ_CPU_ISA");
  if (asked == nullptr) return supported_kernels().front();
  for (const Kernels& kernels : supported_kernels()) {
    if (std::string(asked) == kernels.isa) return kernels;
  }
  bool known = false;
  for (const Candidate& c : candidates()) known |= std::string(asked) == c.name;
  throw std::runtime_error(std::string("SKVQ_CPU_ISA=") + asked +
                           (known ? " is not supported by this CPU" : " is not an instruction set of this build") +
                           "; this build has " + built_isas() + ". Unset the variable to let the library choose.");
}

}  // namespace

std::vector<Kernels> supported_kernels() {
  std::vector<Kernels> sets;
  for (const Candidate& c : candidates()) {
    if (c.supported) sets.push_back(c.make());
  }
  return sets;
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

const char* built_isas() {
#if defined(__x86_64__)
  return "avx512, avx2, portable";
#else
  return "portable";
#endif
}

}  // namespace skvq::cpu

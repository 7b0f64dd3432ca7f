#include "cpu/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

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

// Best first.
template <class F>
void each_candidate(F&& visit) {
#if defined(__x86_64__)
  visit(Candidate{"avx512",
                  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"),
                  [] { return Kernels{"avx512", avx512::pack_kernels(), avx512::attend_kernels()}; }});
  visit(Candidate{"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
                  [] { return Kernels{"avx2", avx2::pack_kernels(), avx2::attend_kernels()}; }});
#endif
  visit(Candidate{"portable", true,
                  [] { return Kernels{"portable", portable::pack_kernels(), portable::attend_kernels()}; }});
}

Kernels choose() {
  const char* asked = std::getenv("SKVQ_CPU_ISA");
  Kernels chosen{};
  bool known = false;
  each_candidate([&](const Candidate& c) {
    const bool named = asked != nullptr && std::string(asked) == c.name;
    known |= named;
    if (chosen.isa == nullptr && c.supported && (asked == nullptr || named)) chosen = c.make();
  });
  if (chosen.isa == nullptr) {
    throw std::runtime_error(std::string("SKVQ_CPU_ISA=") + asked +
                             (known ? " is not supported by this CPU" : " is not an instruction set of this build") +
                             "; this build has " + built_isas() + ". Unset the variable to let the library choose.");
  }
  return chosen;
}

}  // namespace

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

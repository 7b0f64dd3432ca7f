// simt_broken_<kind> CASE       runs the broken kernel of a case
// simt_broken_<kind> --right    runs the right kernels of all cases
// simt_broken_<kind> --list     names them
// Says "right", "wrong numbers" or what the emulator noticed; sanitizers say what they say.
#include <cstdio>
#include <cstring>

#include "simt/broken/cases.h"

namespace simt::broken {
namespace {

Cases all_cases() {
  Cases all;
  for (const Cases& some : {barriers(), warps(), copies(), bulk_copies(), memory()}) {
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

bool run(const Case& c, Kernel kernel) {
  std::vector<int> in(kWords), out(kBlocks * kThreads + 1 + kBlocks, 0);
  for (int i = 0; i < kWords; ++i) in[i] = input(i);
  try {
    launch(kernel, kBlocks, kThreads, kDynamicBytes, out.data(), in.data());
  } catch (const Error& error) {
    std::printf("%s: emulator: %s\n", c.name, error.what());
    return false;
  }
  for (int block = 0; block < kBlocks; ++block) {
    for (int thread = 0; thread < kThreads; ++thread) {
      const int found = out[block * kThreads + thread], expected = c.expected(block, thread);
      if (found == expected) continue;
      std::printf("%s: wrong numbers: block %d thread %d has %d instead of %d\n", c.name, block, thread, found,
                  expected);
      return false;
    }
  }
  std::printf("%s: right\n", c.name);
  return true;
}

int main(const char* argument) {
  const Cases all = all_cases();
  if (std::strcmp(argument, "--list") == 0) {
    for (const Case& c : all) std::puts(c.name);
    return 0;
  }
  bool right = true, found = false;
  for (const Case& c : all) {
    const bool chosen = std::strcmp(argument, c.name) == 0;
    if (!chosen && std::strcmp(argument, "--right") != 0) continue;
    found = true;
    right &= run(c, chosen ? c.broken : c.right);
  }
  if (!found) std::fprintf(stderr, "there is no case \"%s\"; --list names them\n", argument);
  return right && found ? 0 : 1;
}

}  // namespace
}  // namespace simt::broken

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s CASE | --right | --list\n", arguments[0]);
    return 2;
  }
  return simt::broken::main(arguments[1]);
}

// From one stack to another. Assembly, because no other way is fast enough: swapcontext asks the kernel each time.
// Of the emulator only this file has any (tests/test_rooms.py).
#pragma once

#include "simt/sanitizers.h"

namespace simt {

// Stores the stack pointer in *save and goes on where `load` was stored. Registers that a callee must keep lie on the
// stacks. A jump instead of a return: the processor would predict a return to the caller.
__attribute__((naked, noipa)) SIMT_RUNTIME inline void switch_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "popq %rcx\n\t"
      "jmpq *%rcx");
}

// What switch_stacks finds on the new stack that begins under `top`: six registers and where to go.
SIMT_RUNTIME inline void* new_stack(void* top, void (*entry)()) {
  void** p = static_cast<void**>(top);
  *--p = nullptr;  // where a return address would be: keeps the stack aligned as after a call
  *--p = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  return p;
}

}  // namespace simt

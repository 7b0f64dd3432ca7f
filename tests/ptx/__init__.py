"""An interpreter of PTX on numpy: it executes what nvcc wrote from the kernels, on a machine without a GPU.

It sees what running the same sources as C++ cannot: operands of inline assembly, `__CUDA_ARCH__` branches, nvcc's
own contraction. Bounds and alignment are exact on every access, asynchronous copies land only when they are waited
for, registers and shared memory start as garbage, and what it does not know is an error that names it.

    parse.py      text -> Module, Kernel, Instruction
    memory.py     device memory with exact bounds, the windows of shared, local and parameter space
    machine.py    the threads of a chunk of blocks: registers, operands, loads and stores
    schedule.py   who runs next: divergence, barriers, one warp after the other
    instructions/ what each opcode does
    launch.py     a grid of one kernel
    compiler.py   nvcc, and the host code of the backend with a runtime that hands its launches to launch.py
    structs.py    include/skvq/cache.h for ctypes

Not modelled: time, caches, the weak order of memory, the rounding inside tensor cores (sums are exact here and rounded
once) and the last bits of approximate functions.
"""

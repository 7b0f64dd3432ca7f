"""An interpreter of PTX on numpy: it executes what nvcc wrote from the kernels, on a machine without a GPU.

It sees what running the same sources as C++ cannot: operands of inline assembly, `__CUDA_ARCH__` branches, nvcc's
own contraction. Bounds and alignment are exact on every access, asynchronous copies land only when they are waited
for, registers and shared memory start as garbage, and what it does not know is an error that names it.

    numbers.py    scalar types, and arithmetic that rounds once
    program.py    modules, kernels, instructions and operands; parse.py and operands.py make them from text
    memory.py     device memory with exact bounds, the windows of shared, local and parameter space
    transfers.py  copies that were issued and have not landed, and the barriers that count them
    machine.py    the threads of a chunk of blocks: registers, operands, loads and stores
    schedule.py   who runs next: divergence, barriers, one warp after the other
    instructions/ what each opcode does
    launch.py     a grid of one kernel
    compiler.py   nvcc, with results kept by content
    backend.py    the host code of csrc/cuda over host/runtime.cpp, a CUDA runtime whose launches are interpreted
    structs.py    include/skvq/cache.h for ctypes; cases.py puts a cache of tests/cache_cases.py on the device
    kernels/      a kernel for each wrapper of ptx.cuh, and the decode instances that tests run

Not modelled: time, caches, the weak order of memory, the rounding inside tensor cores (sums are exact here and rounded
once) and the last bits of approximate functions.
"""

# How the CUDA kernels are compiled for the emulator (docs/simt.md), in three kinds: plain, asan (AddressSanitizer and
# UndefinedBehaviorSanitizer) and tsan (ThreadSanitizer). Sets SKVQ_HAVE_SIMT.
include_guard(GLOBAL)

set(SKVQ_HAVE_SIMT OFF)
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" OR NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(NOTICE "skvq: no tests of the CUDA kernels: their emulator (tests/simt) needs an x86-64 processor and GCC, "
    "found ${CMAKE_SYSTEM_PROCESSOR} and ${CMAKE_CXX_COMPILER_ID}")
  return()
endif()
set(SKVQ_HAVE_SIMT ON)

set(SKVQ_SIMT_KINDS plain asan tsan)
set(SKVQ_SIMT_FLAGS "" CACHE STRING "more compiler flags for the emulated kernels, for example -O0;-g3 for a debugger")
set(simt_flags_plain -O2)
# Of UBSan, what costs most time to compile is left to ASan, which stops at the bad access itself.
set(simt_flags_asan -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined,bounds-strict
  -fno-sanitize=null,object-size,pointer-overflow -fno-sanitize-recover=undefined)
set(simt_flags_tsan -O1 -g1 -fno-omit-frame-pointer -fsanitize=thread)

# simt_<kind>: for every source that includes kernels.
foreach(kind IN LISTS SKVQ_SIMT_KINDS)
  add_library(simt_${kind} INTERFACE)
  target_include_directories(simt_${kind} INTERFACE
    ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/csrc ${PROJECT_SOURCE_DIR}/tests)
  target_compile_definitions(simt_${kind} INTERFACE SKVQ_SIMT)
  # Codes must agree with the CPU in every bit; operands are moved through bytes as on the GPU.
  target_compile_options(simt_${kind} INTERFACE ${simt_flags_${kind}} -ffp-contract=off -fno-strict-aliasing
    -Wall -Wextra -Wno-unknown-pragmas ${SKVQ_SIMT_FLAGS})
  target_link_options(simt_${kind} INTERFACE ${simt_flags_${kind}})
endforeach()

# skvq_simt_library(kind [NAME name] [FEW] [DEFINITIONS ...]): the CUDA backend as skvq_cuda_<kind>, or as skvq_<name>.
# FEW: with the decode kernels of tests/simt/few instead of all of them.
function(skvq_simt_library kind)
  cmake_parse_arguments(PARSE_ARGV 1 arg "FEW" "NAME" "DEFINITIONS")
  if(NOT arg_NAME)
    set(arg_NAME cuda_${kind})
  endif()
  set(target skvq_${arg_NAME})
  set(cuda ${PROJECT_SOURCE_DIR}/csrc/cuda)
  set(few ${PROJECT_SOURCE_DIR}/tests/simt/few)
  file(GLOB sources CONFIGURE_DEPENDS ${cuda}/*.cu)
  if(arg_FEW)
    list(APPEND sources ${few}/few.cu)
  else()
    file(GLOB instances CONFIGURE_DEPENDS ${cuda}/instances/*.cu)
    list(APPEND sources ${instances})
  endif()
  add_library(${target} STATIC EXCLUDE_FROM_ALL ${sources} ${PROJECT_SOURCE_DIR}/csrc/core/format_text.cpp)
  set_source_files_properties(${sources} TARGET_DIRECTORY ${target} PROPERTIES LANGUAGE CXX)
  if(arg_FEW)
    target_include_directories(${target} BEFORE PRIVATE ${few})  # its cuda/instances/list.h comes first
  endif()
  target_compile_definitions(${target} PRIVATE ${arg_DEFINITIONS})
  target_link_libraries(${target} PUBLIC simt_${kind})
endfunction()

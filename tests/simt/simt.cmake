# How the CUDA kernels are compiled for the emulator (docs/simt.md), in three kinds: plain, asan (AddressSanitizer and
# UndefinedBehaviorSanitizer) and tsan (ThreadSanitizer). Sets SKVQ_HAVE_SIMT.
include_guard(GLOBAL)
include(CheckCXXSourceCompiles)

set(SKVQ_HAVE_SIMT OFF)
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" OR NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(NOTICE "skvq: no tests of the CUDA kernels: their emulator (tests/simt) needs an x86-64 processor and GCC, "
    "found ${CMAKE_SYSTEM_PROCESSOR} and ${CMAKE_CXX_COMPILER_ID}")
  return()
endif()
set(SKVQ_HAVE_SIMT ON)

set(SKVQ_SIMT_FLAGS "" CACHE STRING "more compiler flags for the emulated kernels, for example -O0;-g3 for a debugger")
set(simt_flags_plain -O1)
# Of UBSan, what costs most time to compile is left to ASan, which stops at the bad access itself.
set(simt_flags_asan -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined,bounds-strict
  -fno-sanitize=null,object-size,pointer-overflow -fno-sanitize-recover=undefined)
set(simt_flags_tsan -O1 -g1 -fno-omit-frame-pointer -fsanitize=thread)

# Distributions ship the libraries of the sanitizers apart from the compiler.
set(SKVQ_SIMT_KINDS plain)
foreach(kind asan tsan)
  set(CMAKE_REQUIRED_FLAGS ${simt_flags_${kind}})
  list(JOIN CMAKE_REQUIRED_FLAGS " " CMAKE_REQUIRED_FLAGS)
  check_cxx_source_compiles("int main() {}" SKVQ_SIMT_LINKS_${kind})
  unset(CMAKE_REQUIRED_FLAGS)
  if(SKVQ_SIMT_LINKS_${kind})
    list(APPEND SKVQ_SIMT_KINDS ${kind})
  else()
    message(NOTICE "skvq: the CUDA kernels are not tested with ${kind}: the compiler cannot link ${simt_flags_${kind}}; "
      "install libasan, libubsan and libtsan")
  endif()
endforeach()

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

# Kernel sources as C++; LIST: a folder of tests/simt/lists whose decode kernels take the place of all.
function(skvq_simt_sources target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "LIST" "SOURCES")
  set(cuda ${PROJECT_SOURCE_DIR}/csrc/cuda)
  list(TRANSFORM arg_SOURCES PREPEND ${cuda}/)
  if(arg_LIST)
    set(list ${PROJECT_SOURCE_DIR}/tests/simt/lists/${arg_LIST})
    set(instances ${list}/${arg_LIST}.cu)
    target_include_directories(${target} BEFORE PRIVATE ${list})  # its cuda/instances/list.h comes first
  else()
    file(GLOB instances CONFIGURE_DEPENDS ${cuda}/instances/*.cu)
  endif()
  target_sources(${target} PRIVATE ${arg_SOURCES} ${instances})
  set_source_files_properties(${arg_SOURCES} ${instances} TARGET_DIRECTORY ${target} PROPERTIES LANGUAGE CXX)
endfunction()

# skvq_simt_library(kind [LIST list]): the CUDA backend as skvq_cuda_<kind>.
function(skvq_simt_library kind)
  file(GLOB sources CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/csrc/cuda ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
  add_library(skvq_cuda_${kind} STATIC EXCLUDE_FROM_ALL ${PROJECT_SOURCE_DIR}/csrc/core/format_text.cpp)
  skvq_simt_sources(skvq_cuda_${kind} SOURCES ${sources} ${ARGN})
  target_link_libraries(skvq_cuda_${kind} PUBLIC simt_${kind})
endfunction()

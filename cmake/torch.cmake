# Where PyTorch is. Sets SKVQ_TORCH_DIR and SKVQ_TORCH_VERSION.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u, importlib.metadata as m; print(u.find_spec('torch').submodule_search_locations[0] + ';' + m.version('torch'))"
  OUTPUT_VARIABLE SKVQ_TORCH_FOUND OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE status ERROR_QUIET)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "no torch in ${Python_EXECUTABLE}: install torch>=2.11 first, then pip install --no-build-isolation .")
endif()
list(GET SKVQ_TORCH_FOUND 0 SKVQ_TORCH_DIR)
list(GET SKVQ_TORCH_FOUND 1 SKVQ_TORCH_VERSION)
if(SKVQ_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "torch ${SKVQ_TORCH_VERSION} is too old to build against: 2.11 or newer is needed.")
endif()

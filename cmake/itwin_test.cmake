# itwin_test(<path without _test.cc> [DEPS targets...] [LABELS labels...] [TIMEOUT seconds] [SERIAL])
# One executable per test file: tests/<path>_test.cc becomes target <path with _>_test. The label defaults to
# "unit". The test runs with ITWIN_BIN (built programs) and ITWIN_SOURCE (this tree) in its environment.
add_custom_target(itwin_tests)
set(ITWIN_TEST_PREFIX "" CACHE STRING "put before test names, to tell builds apart, e.g. asan/")

function(itwin_test path)
  cmake_parse_arguments(ARG "SERIAL" "TIMEOUT" "DEPS;LABELS" ${ARGN})
  string(REPLACE "/" "_" target ${path}_test)
  add_executable(${target} ${CMAKE_SOURCE_DIR}/tests/${path}_test.cc)
  set_target_properties(${target} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_include_directories(${target} PRIVATE ${CMAKE_SOURCE_DIR})
  target_link_libraries(${target} PRIVATE itwin::warnings GTest::gtest_main GTest::gmock ${ARG_DEPS})
  target_compile_options(${target} PRIVATE -O0)  # the tests' own code: compile time counts more
  add_dependencies(itwin_tests ${target})
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 60)
  endif()
  if(ITWIN_SANITIZE)
    math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 4")
  endif()
  add_test(NAME ${ITWIN_TEST_PREFIX}${path} COMMAND ${target})
  itwin_test_properties(${path} LABELS ${ARG_LABELS} TIMEOUT ${ARG_TIMEOUT})
  if(ARG_SERIAL)
    set_tests_properties(${ITWIN_TEST_PREFIX}${path} PROPERTIES RUN_SERIAL ON)
  endif()
endfunction()

# itwin_script_test(<name> COMMAND argv... [LABELS labels...] [TIMEOUT seconds] [SERIAL]): a test that is a program
# or script, e.g. pytest.
function(itwin_script_test name)
  cmake_parse_arguments(ARG "SERIAL" "TIMEOUT" "COMMAND;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  add_test(NAME ${ITWIN_TEST_PREFIX}${name} COMMAND ${ARG_COMMAND})
  itwin_test_properties(${name} LABELS ${ARG_LABELS} TIMEOUT ${ARG_TIMEOUT})
  if(ARG_SERIAL)
    set_tests_properties(${ITWIN_TEST_PREFIX}${name} PROPERTIES RUN_SERIAL ON)
  endif()
endfunction()

function(itwin_test_properties name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "LABELS" ${ARGN})
  set(environment "ITWIN_BIN=${CMAKE_BINARY_DIR}/bin" "ITWIN_SOURCE=${CMAKE_SOURCE_DIR}"
    "ITWIN_BUILD=${CMAKE_BINARY_DIR}" "PYTHONPATH=${CMAKE_BINARY_DIR}/python" "PYTHONDONTWRITEBYTECODE=1")
  if(ITWIN_SANITIZE)
    list(APPEND environment "ITWIN_SANITIZED=1")
  endif()
  if(ITWIN_SANITIZE MATCHES "thread")
    list(APPEND environment "TSAN_OPTIONS=suppressions=${CMAKE_SOURCE_DIR}/tests/testing/tsan.supp ignore_noninstrumented_modules=1 history_size=4 halt_on_error=1")
  elseif(ITWIN_SANITIZE)
    list(APPEND environment "UBSAN_OPTIONS=print_stacktrace=1"
      "LSAN_OPTIONS=suppressions=${CMAKE_SOURCE_DIR}/tests/testing/lsan.supp:print_suppressions=0"
      # Freed memory is kept back for a while; little of it, as some tests look at the memory in use.
      "ASAN_OPTIONS=detect_stack_use_after_return=0:quarantine_size_mb=8")
  endif()
  set_tests_properties(${ITWIN_TEST_PREFIX}${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT}
    ENVIRONMENT "${environment}")
endfunction()

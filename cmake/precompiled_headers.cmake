# itwin_precompile_headers(): for builds that are there to check (sanitizers, clang). Most of their time would go into
# reading the headers of gRPC, protobuf and absl again for every file; here they are read once for the code and once for
# the tests. The dev build does without, so that a file that forgets an include does not compile there.
option(ITWIN_PRECOMPILE_HEADERS "precompile the headers of gRPC, protobuf, absl and GoogleTest" OFF)

set(itwin_precompiled
  <algorithm> <atomic> <chrono> <deque> <filesystem> <fstream> <functional> <iostream> <map> <memory> <optional> <set>
  <sstream> <string> <thread> <utility> <variant> <vector>
  <absl/cleanup/cleanup.h> <absl/container/flat_hash_map.h> <absl/container/flat_hash_set.h> <absl/status/statusor.h>
  <absl/strings/str_cat.h> <absl/strings/str_format.h> <absl/strings/str_join.h> <absl/strings/str_split.h>
  <absl/synchronization/mutex.h> <absl/synchronization/notification.h> <absl/time/clock.h>
  <grpcpp/grpcpp.h> <itwin/agent/v1/agent.grpc.pb.h> <itwin/v1/artifacts.grpc.pb.h> <itwin/v1/jobs.grpc.pb.h>
  <itwin/v1/sites.grpc.pb.h>)

function(itwin_targets_below directory out)
  get_property(targets DIRECTORY ${directory} PROPERTY BUILDSYSTEM_TARGETS)
  get_property(below DIRECTORY ${directory} PROPERTY SUBDIRECTORIES)
  foreach(one IN LISTS below)
    itwin_targets_below(${one} more)
    list(APPEND targets ${more})
  endforeach()
  set(${out} ${targets} PARENT_SCOPE)
endfunction()

function(itwin_precompile_headers)
  if(NOT ITWIN_PRECOMPILE_HEADERS)
    return()
  endif()
  file(WRITE ${CMAKE_BINARY_DIR}/generated/precompiled.cc "")
  foreach(kind code test)
    add_library(itwin_precompiled_${kind} OBJECT ${CMAKE_BINARY_DIR}/generated/precompiled.cc)
    target_link_libraries(itwin_precompiled_${kind} PRIVATE itwin::warnings itwin_spdlog itwin::proto_grpc)
    target_precompile_headers(itwin_precompiled_${kind} PRIVATE ${itwin_precompiled})
  endforeach()
  if(ITWIN_BUILD_TESTS)
    target_link_libraries(itwin_precompiled_test PRIVATE GTest::gmock)
    target_precompile_headers(itwin_precompiled_test PRIVATE <gmock/gmock.h> <gtest/gtest.h>)
    target_compile_options(itwin_precompiled_test PRIVATE -O0)  # as itwin_test
  endif()
  itwin_targets_below(${CMAKE_SOURCE_DIR} targets)
  foreach(target IN LISTS targets)
    get_target_property(libraries ${target} LINK_LIBRARIES)
    get_target_property(source ${target} SOURCE_DIR)
    if(NOT "itwin::warnings" IN_LIST libraries OR target MATCHES "^itwin_precompiled_" OR source MATCHES "/worker")
      continue()
    endif()
    target_compile_options(${target} PRIVATE -pthread)  # as gRPC's users have it, or the compiler refuses the file
    get_target_property(type ${target} TYPE)
    if(type STREQUAL "EXECUTABLE" AND source MATCHES "^${CMAKE_SOURCE_DIR}/tests" AND NOT source MATCHES "/benchmark$")
      target_precompile_headers(${target} REUSE_FROM itwin_precompiled_test)
    else()
      target_precompile_headers(${target} REUSE_FROM itwin_precompiled_code)
    endif()
  endforeach()
endfunction()

# Warnings are errors in our code; generated code does not link this target.
add_library(itwin_warnings INTERFACE)
add_library(itwin::warnings ALIAS itwin_warnings)
target_compile_options(itwin_warnings INTERFACE
  -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Wswitch-enum -Wno-unused-parameter -Werror)
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  target_compile_options(itwin_warnings INTERFACE -Wthread-safety)
endif()
if(ITWIN_SANITIZE)
  target_compile_options(itwin_warnings INTERFACE
    -fsanitize=${ITWIN_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
  target_link_options(itwin_warnings INTERFACE -fsanitize=${ITWIN_SANITIZE})
  if(ITWIN_SANITIZE MATCHES "thread")
    # Debian's libraries were built without the sanitizer. Their headers must not change layouts because of it (protobuf
    # adds members), and it has to be told about absl::Mutex.
    target_compile_options(itwin_warnings INTERFACE -U__SANITIZE_THREAD__)
    add_library(itwin_tsan_absl STATIC ${CMAKE_SOURCE_DIR}/tests/testing/tsan_absl_mutex.cc)
    target_compile_options(itwin_tsan_absl PRIVATE -fsanitize=thread)
    add_dependencies(itwin_warnings itwin_tsan_absl)
    target_link_options(itwin_warnings INTERFACE -Wl,--whole-archive $<TARGET_FILE:itwin_tsan_absl> -Wl,--no-whole-archive)
  endif()
endif()

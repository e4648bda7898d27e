# itwin-agent: no network library beyond gRPC on a Unix socket, no database; static, so that one file is all that has to
# be brought to a site.
add_library(itwin_agent_lib STATIC
  agent.cc control_loop.cc follow_loop.cc
  rpc/acceptor.cc rpc/admin.cc rpc/agent_service.cc rpc/connect.cc rpc/follow_reactor.cc rpc/gateway_claims.cc
  rpc/host_checks.cc rpc/root_lock.cc rpc/socket.cc
  scheduler/bounded_log.cc scheduler/launch.cc scheduler/lease.cc scheduler/oom_counter.cc
  scheduler/process_scheduler.cc
  scheduler/process_tree.cc scheduler/supervisor.cc scheduler/verdict.cc
  scheduler/slurm/batch_script.cc scheduler/slurm/job_track.cc scheduler/slurm/slurm_checks.cc
  scheduler/slurm/slurm_commands.cc scheduler/slurm/slurm_scheduler.cc scheduler/slurm/slurm_state.cc
  scheduler/slurm/slurm_text.cc
  spool/attempt_directory.cc spool/fault_point.cc spool/input_store.cc spool/lifecycle.cc spool/mailbox.cc
  spool/release.cc spool/spool_files.cc spool/tail.cc spool/work_pool.cc)
add_library(itwin::agent ALIAS itwin_agent_lib)
target_link_libraries(itwin_agent_lib
  PRIVATE itwin::warnings nlohmann_json::nlohmann_json
  PUBLIC itwin::common itwin::grpc_status itwin::proto itwin::proto_grpc)

add_library(itwin_agent_main OBJECT main.cc)
target_link_libraries(itwin_agent_main PRIVATE itwin::warnings itwin::agent CLI11::CLI11)
add_executable(itwin-agent $<TARGET_OBJECTS:itwin_agent_main>)

if(ITWIN_STATIC_AGENT AND NOT ITWIN_SANITIZE)
  # The packages' CMake targets name shared libraries; pkg-config knows the static ones, of which the linker takes what
  # it needs, in whatever order (hence the group). It does not know what RE2 needs of Abseil since that logs by it (Debian 13),
  # so all of Abseil's are offered.
  find_package(PkgConfig REQUIRED)
  pkg_check_modules(ITWIN_GRPC_STATIC REQUIRED grpc++)
  pkg_check_modules(ITWIN_PROTOBUF_STATIC REQUIRED protobuf)
  find_library(ITWIN_ABSL_BASE_STATIC libabsl_base.a REQUIRED)
  cmake_path(GET ITWIN_ABSL_BASE_STATIC PARENT_PATH itwin_absl_directory)
  file(GLOB itwin_absl_archives ${itwin_absl_directory}/libabsl_*.a)
  set(itwin_own_archives)
  foreach(library itwin_agent_lib itwin_grpc_status itwin_proto_grpc itwin_proto itwin_common)
    add_dependencies(itwin-agent ${library})
    list(APPEND itwin_own_archives $<TARGET_FILE:${library}>)
  endforeach()
  set_property(TARGET itwin-agent PROPERTY LINK_DEPENDS ${itwin_own_archives})
  # The linker warns that getaddrinfo, dlopen and their like need glibc's shared libraries at run time. The agent calls none
  # of them: it speaks on a Unix socket. (The linker's --no-warnings would also hide undefined symbols.)
  target_link_options(itwin-agent PRIVATE -static)
  target_link_libraries(itwin-agent PRIVATE itwin::warnings
    -Wl,--start-group ${itwin_own_archives} ${ITWIN_GRPC_STATIC_STATIC_LIBRARIES}
    ${ITWIN_PROTOBUF_STATIC_STATIC_LIBRARIES} ${itwin_absl_archives} -Wl,--end-group)
else()
  target_link_libraries(itwin-agent PRIVATE itwin::warnings itwin::agent)
endif()
install(TARGETS itwin-agent RUNTIME)

#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/spool/attempt_directory.h"
#include "itwin/agent/v1/agent.pb.h"

namespace itwin::agent {

// What a site decides about starting programs; the same for all its attempts.
struct LaunchOptions {
  // Path of itwin-worker; "" when the site has none.
  std::string worker = {};
  // How many ranks are started; {ranks}, {nodes}, {ranks_per_node} and {cpus_per_rank} are filled in.
  // :OVERSUBSCRIBE and --bind-to none: the slots are counted by us, and a container may hide what is bound.
  std::string launcher = "mpirun -n {ranks} --map-by :OVERSUBSCRIBE --bind-to none";
  // From SIGTERM to SIGKILL.
  absl::Duration grace = absl::Seconds(10);
};

// A command line as a shell would split it: blanks, '…', "…" and \. kInvalidArgument: a quote is not closed.
absl::StatusOr<std::vector<std::string>> SplitCommandLine(const std::string& text);
// For a script: always one word to a shell.
std::string ShellQuote(const std::string& text);

// The script the scheduler starts: it only execs `agent_program run-attempt`.
std::string RenderScript(const AttemptDirectory& directory, const std::string& agent_program,
                         const LaunchOptions& options);

// The program to run and what it is run by: launcher, container, program; what the request says of these goes before the
// options. With a prologue all of it is run by bash, after the prologue's lines. kInvalidArgument: it cannot be used.
absl::StatusOr<std::vector<std::string>> LaunchCommand(const AttemptDirectory& directory,
                                                       const v1::StartAttemptRequest& request,
                                                       const LaunchOptions& options);

// The environment of the attempt beyond the script's own: the user's variables, then the worker contract's, which win.
std::map<std::string, std::string> LaunchEnvironment(const AttemptDirectory& directory,
                                                     const v1::StartAttemptRequest& request,
                                                     const std::string& lease_nonce, absl::Time deadline);

// Path of the worker that the request or the options name; "" for none.
std::string WorkerOf(const v1::StartAttemptRequest& request, const LaunchOptions& options);

// Whether `program` can be executed from the working directory `directory` with this PATH; else words for the user:
// what was looked for, where, and what would help.
absl::Status CheckProgram(const std::string& program, const std::string& directory, const std::string& path);

}  // namespace itwin::agent

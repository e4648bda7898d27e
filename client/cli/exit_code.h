#pragma once

#include "absl/status/status.h"
#include "itwin/v1/jobs.pb.h"

// What the command's end tells a script. Documented in docs/cli.md and --help; never renumbered.
namespace itwin::cli {

enum ExitCode : int {
  kOk = 0,
  kUnsuccessful = 1,     // watch and submit --watch: the job failed or was cancelled; site doctor: a check failed
  kUsage = 2,            // wrong arguments or a wrong job document
  kNotFound = 3,
  kNotAllowed = 4,   // no or bad token, or somebody else's job
  kUnreachable = 5,  // the gateway did not answer
  kOther = 6,
  kInterrupted = 130,  // Ctrl-C; a watched job goes on
};

int ExitCodeOf(const absl::Status& status);
// Of a job that has ended.
int ExitCodeOf(v1::JobState state);

}  // namespace itwin::cli

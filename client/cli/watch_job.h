#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "client/cli/session.h"

namespace itwin::cli {

// Shows the job until it ends; the exit code that its end deserves. Ctrl-C ends the program, not the job, and says so.
absl::StatusOr<int> WatchJob(Session& session, const std::string& job);

}  // namespace itwin::cli

#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "agent/rpc/connect.h"

// What a person at the site's shell does with a root.
namespace itwin::agent {

// Ends the agent; none living is fine. With `kill_jobs` every attempt that has not ended is cancelled first, and
// waited for. `*words` tells what was done.
absl::Status StopAgent(const ConnectOptions& options, bool kill_jobs, absl::Duration limit, std::string* words);

// A few lines (or, with `json`, one object) about the agent and its unfinished attempts.
absl::Status DescribeAgent(const ConnectOptions& options, bool json, std::string* words);

}  // namespace itwin::agent

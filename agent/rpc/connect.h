#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/files.h"

namespace itwin::agent {

struct ConnectOptions {
  std::string root = {};
  std::string agent_program = {};             // what to start when no agent lives
  std::vector<std::string> serve_flags = {};  // for that
  absl::Duration limit = absl::Seconds(45);  // an agent elsewhere may have to be waited for
};

// A connection to the agent of the root, which is started (detached, log in `<root>/agent.log`) when none lives; of
// many callers at once one starts it; one that lives on another host is asked to leave. kDeadlineExceeded or
// kUnavailable: it does not come up; the message has its last words.
absl::StatusOr<FileDescriptor> ConnectToAgent(const ConnectOptions& options);

// Joins `in`/`out` and the socket until either side closes. What the agent still sent is written out.
absl::Status Relay(int in, int out, int socket);

}  // namespace itwin::agent

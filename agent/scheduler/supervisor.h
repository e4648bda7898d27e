#pragma once

#include <string>

#include "agent/scheduler/launch.h"
#include "agent/spool/attempt_directory.h"

namespace itwin::agent {

// `itwin-agent run-attempt DIR`: what the script of an attempt execs, whatever scheduler started it. It takes the
// lease, records `started`, runs the program in a session of its own with its output in bounded logs, ends it at
// the wall limit or when asked (SIGTERM; SIGUSR1 and SIGUSR2 ask it to save and exit), kills whatever the program left
// behind, writes result.json for a `command` job that succeeded, and records `exited`.
//
// Returns the exit code for the scheduler: the program's own, 128 + signal, 0 for a second copy that found the
// lease taken, 1 when it could not record anything.
int RunAttempt(const AttemptDirectory& directory, const LaunchOptions& options);

}  // namespace itwin::agent

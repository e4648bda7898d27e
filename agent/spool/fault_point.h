#pragma once

namespace itwin::agent {

// For crash tests: kills this process as SIGKILL would when the environment's ITWIN_TEST_CRASH_AT is `name`, or is
// "<n>:<name>" and this is the n-th time. Nothing otherwise.
void FaultPoint(const char* name);

}  // namespace itwin::agent

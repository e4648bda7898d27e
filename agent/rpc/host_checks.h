#pragma once

#include <string>
#include <vector>

#include "itwin/agent/v1/agent.pb.h"

namespace itwin::agent {

// What `itwin site doctor` wants to know of this host, whatever runs the jobs: "scratch" (writing and fsync under the root,
// room left), "quota" (of the user there) and "host" (limits on processes, files and CPU time of a daemon here).
std::vector<v1::CheckResult> CheckHost(const std::string& root);

}  // namespace itwin::agent

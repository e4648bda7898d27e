#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "agent/spool/input_store.h"
#include "itwin/agent/v1/agent.pb.h"

namespace itwin::agent {

// Programs that the gateway brings, below `<root>/releases/`: one directory per release, made whole and never changed again,
// and the link `current` to the newest. Attempts run from the release they were started from.

// Makes the release and switches `current`; a release that is there is only switched to. Returns its directory.
// kInvalidArgument: a name that is no directory's. kFailedPrecondition: an input is not in the store.
absl::StatusOr<std::string> InstallRelease(const std::string& root, const v1::InstallReleaseRequest& request,
                                           InputStore* inputs);

}  // namespace itwin::agent

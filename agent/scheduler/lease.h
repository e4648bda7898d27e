#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "agent/scheduler/process_tree.h"
#include "agent/spool/attempt_directory.h"

namespace itwin::agent {

// Who runs an attempt. Written once, together with the lease itself.
struct LeaseOwner {
  std::string nonce = {};  // random; the attempt's processes carry it as ITWIN_LEASE
  std::string host = {};
  std::string scheduler_id = {};
  int restart = 0;  // which life of the scheduler's job: it may have put the job back into its queue
  ProcessIdentity process = {};  // of the script
};

// The right to run an attempt, given once and for ever. The directory `lease/` appears by a rename that carries
// the owner's record with it, so it is there whole or not at all and only one of many can succeed.
// Returns false when somebody else has it. kResourceExhausted: no space; nothing is left behind.
absl::StatusOr<bool> TakeLease(const AttemptDirectory& directory, const LeaseOwner& owner);

// Nothing when there is no lease; an owner with empty fields when its record cannot be read.
std::optional<LeaseOwner> ReadLease(const AttemptDirectory& directory);

// The session of the launched program, for cleaning up after a killed script; 0 when it never came to that.
absl::Status RecordProgram(const AttemptDirectory& directory, const ProcessIdentity& program);
std::optional<ProcessIdentity> ReadProgram(const AttemptDirectory& directory);

}  // namespace itwin::agent

#pragma once

#include <optional>
#include <string>

#include "absl/time/time.h"
#include "agent/scheduler/scheduler.h"
#include "agent/spool/lifecycle.h"
#include "itwin/agent/v1/agent.pb.h"

namespace itwin::agent {

// All that is known of an attempt.
struct Evidence {
  AttemptKey key;
  bool requested = false;      // request.pb is there
  bool lease = false;
  bool cancelled = false;      // we were asked to end it
  std::string cancel_reason = {};
  std::optional<std::string> launch_error = {};  // the script could not be started
  absl::Time submitted = {};        // when request.pb was written
  // The scheduler will say why it ended what the record only calls killed: until then that is not told.
  bool await_scheduler = false;
  Lifecycle lifecycle = {};         // read after `report` was made
  SchedulerReport report = {};
};

// What follows from it. Pure. In order: the script's own exit record; a recorded launch error; what the scheduler
// says. Gone without a record is LOST, never success; absence is a verdict only where nothing was ever started.
//
//   exit record | report                  | lease | cancelled | phase
//   yes         | any                     |       |           | ENDED, by the record; one that says only "killed" waits for
//               |                         |       |           | the scheduler's word where one will come
//   no          | ended with a cause      |       |           | ENDED, by the scheduler
//   no          | ended                   | yes   | no / yes  | ENDED, LOST / CANCELLED
//   no          | ended                   | no    | no / yes  | ENDED, LAUNCH_FAILED / CANCELLED
//   no          | absent                  | no    | no / yes  | PENDING (about to be submitted) / ENDED, CANCELLED
//   no          | absent                  | yes   |           | UNKNOWN
//   no          | running                 |       |           | RUNNING once `started` is recorded, before PENDING
//   no          | pending held suspended  |       |           | that
//   no          | unknown                 |       |           | RUNNING if started, else UNKNOWN
v1::AttemptStatus Conclude(const Evidence& evidence);

}  // namespace itwin::agent

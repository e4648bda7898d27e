#pragma once

#include <optional>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "agent/scheduler/scheduler.h"
#include "itwin/agent/v1/agent.pb.h"

// SLURM's words for the state of a job, and why one waits. Pure and total: a word nobody has heard of keeps its text,
// ends nothing, and is counted by the caller.
namespace itwin::agent {

enum class SlurmState {
  kUnrecognized,
  kPending,
  kHeld,          // REQUEUE_HOLD, SPECIAL_EXIT, RESV_DEL_HOLD: needs a person
  kConfiguring,   // nodes boot
  kRunning,
  kSuspended,     // gang scheduling, preemption by suspension
  kCompleting,    // may take KillWait, or hang on a bad node; not final
  kCompleted,
  kCancelled,
  kFailed,
  kTimeout,
  kDeadline,
  kNodeFail,
  kBootFail,
  kLaunchFailed,
  kOutOfMemory,
  kPreempted,
  kRevoked,       // a sibling cluster of a federation runs it
};

// From the long form of squeue or sacct: "CANCELLED by 1000" and "CANCELLED+" are CANCELLED. A flag that squeue shows in
// place of the state (COMPLETING, CONFIGURING, ...) is a word like the others.
SlurmState ParseSlurmState(absl::string_view word);
bool IsTerminal(SlurmState state);

// What a state that is not terminal is to us, and in words ("" when the state says it all); waiting is told by ExplainPending.
struct LiveState {
  SchedulerState state;
  absl::string_view words;
};
LiveState LiveStateOf(SlurmState state);

// How the attempt ended, as far as the state alone says: UNSPECIFIED for COMPLETED and FAILED, whose meaning is in the
// exit record, and for all that is not terminal.
v1::EndCause CauseOfState(SlurmState state, bool we_cancelled);

enum class ReasonKind {
  kWaiting,
  kHeld,        // until somebody releases it
  kPermanent,   // will never start as it was asked for
};
struct PendingReason {
  ReasonKind kind = ReasonKind::kWaiting;
  std::string words = {};  // a sentence for the user with SLURM's own word in parentheses
};
PendingReason ExplainPending(absl::string_view reason);

// "code:signal" as sacct prints it, or the raw wait status that squeue prints before 23.02. Nothing for other text.
struct SlurmExit {
  int code = 0;
  int signal = 0;
  friend bool operator==(const SlurmExit&, const SlurmExit&) = default;
};
std::optional<SlurmExit> ParseExit(absl::string_view text);

// How a job that ended is told to a user when our own records say nothing: "SLURM says FAILED (JobLaunchFailure), killed by
// signal 9". 0:9 with JobLaunchFailure is what SLURM says of a script that was killed; it is told as that.
std::string DescribeEnd(absl::string_view word, absl::string_view reason, const std::optional<SlurmExit>& exit);

}  // namespace itwin::agent

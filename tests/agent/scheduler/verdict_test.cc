#include "agent/scheduler/verdict.h"

#include <gtest/gtest.h>

namespace itwin::agent {
namespace {

Evidence Basis() {
  Evidence e;
  e.key = *AttemptKey::Parse("00000000000000aa-1");
  e.requested = true;
  e.submitted = absl::FromUnixSeconds(100);
  return e;
}

Evidence WithLease() {
  Evidence e = Basis();
  e.lease = true;
  e.lifecycle.started.push_back({.time = absl::FromUnixSeconds(101), .host = "n1", .pid = 5});
  return e;
}

struct Row {
  const char* name;
  Evidence evidence;
  v1::AttemptPhase phase;
  v1::EndCause cause = v1::END_CAUSE_UNSPECIFIED;
};

Evidence With(Evidence e, SchedulerState state) {
  e.report.state = state;
  return e;
}
Evidence Cancelled(Evidence e) {
  e.cancelled = true;
  return e;
}
Evidence Exited(Evidence e, const char* cause, int code, int signal = 0) {
  e.lifecycle.exited = ExitedRecord{.time = absl::FromUnixSeconds(102), .exit_code = code, .signal = signal, .cause = cause};
  return e;
}
Evidence Caused(Evidence e, v1::EndCause cause) {
  e.report.state = SchedulerState::kEnded;
  e.report.cause = cause;
  return e;
}
Evidence LaunchError(Evidence e) {
  e.launch_error = "no such thing";
  return e;
}

TEST(Verdict, FollowsFromTheEvidence) {
  using S = SchedulerState;
  Evidence absent = Basis();
  absent.requested = false;
  const Row rows[] = {
      {"never heard of", absent, v1::ATTEMPT_PHASE_ABSENT},
      {"barred", Cancelled(absent), v1::ATTEMPT_PHASE_ABSENT},
      {"between request and submit", With(Basis(), S::kAbsent), v1::ATTEMPT_PHASE_PENDING},
      {"waits", With(Basis(), S::kPending), v1::ATTEMPT_PHASE_PENDING},
      {"held", With(Basis(), S::kHeld), v1::ATTEMPT_PHASE_HELD},
      {"script not yet at its work", With(Basis(), S::kRunning), v1::ATTEMPT_PHASE_PENDING},
      {"runs", With(WithLease(), S::kRunning), v1::ATTEMPT_PHASE_RUNNING},
      {"runs, scheduler behind", With(WithLease(), S::kPending), v1::ATTEMPT_PHASE_RUNNING},
      {"runs, scheduler silent", With(WithLease(), S::kUnknown), v1::ATTEMPT_PHASE_RUNNING},
      {"suspended", With(WithLease(), S::kSuspended), v1::ATTEMPT_PHASE_SUSPENDED},
      {"nobody can say", With(Basis(), S::kUnknown), v1::ATTEMPT_PHASE_UNKNOWN},
      {"absence of a started one is no verdict", With(WithLease(), S::kAbsent), v1::ATTEMPT_PHASE_UNKNOWN},
      {"gone without a record", With(WithLease(), S::kEnded), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_LOST},
      {"killed by us", Cancelled(With(WithLease(), S::kEnded)), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_CANCELLED},
      {"cancelled while waiting", Cancelled(With(Basis(), S::kAbsent)), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_CANCELLED},
      {"being cancelled", Cancelled(With(WithLease(), S::kRunning)), v1::ATTEMPT_PHASE_RUNNING},
      {"script never began", With(Basis(), S::kEnded), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_LAUNCH_FAILED},
      {"launch error", LaunchError(With(Basis(), S::kEnded)), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_LAUNCH_FAILED},
      {"node failed", Caused(WithLease(), v1::END_CAUSE_NODE_FAILED), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_NODE_FAILED},
      {"exited", Exited(With(WithLease(), S::kRunning), "", 3), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_EXITED},
      {"exited, cancel too late", Cancelled(Exited(WithLease(), "", 0)), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_EXITED},
      {"exited by cancel", Cancelled(Exited(WithLease(), "cancelled", 0, 15)), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_CANCELLED},
      {"time limit", Exited(WithLease(), "time_limit", 0, 15), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_TIME_LIMIT},
      {"no program", Exited(WithLease(), "launch_failed", 127), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_LAUNCH_FAILED},
      {"ended from outside", Exited(WithLease(), "terminated", 0, 15), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_CANCELLED_EXTERNALLY},
      {"preempted", Exited(Caused(WithLease(), v1::END_CAUSE_PREEMPTED), "terminated", 0, 15), v1::ATTEMPT_PHASE_ENDED, v1::END_CAUSE_PREEMPTED},
  };
  for (const Row& row : rows) {
    const v1::AttemptStatus status = Conclude(row.evidence);
    EXPECT_EQ(status.phase(), row.phase) << row.name;
    EXPECT_EQ(status.cause(), row.cause) << row.name;
    if (status.phase() == v1::ATTEMPT_PHASE_ENDED) {
      EXPECT_FALSE(status.reason().empty()) << row.name;
    }
  }
}

TEST(Verdict, CarriesTheNumbers) {
  const v1::AttemptStatus status = Conclude(Exited(WithLease(), "", 3));
  EXPECT_EQ(status.exit_code(), 3);
  EXPECT_EQ(status.host(), "n1");
  EXPECT_EQ(status.started_us(), 101'000'000);
  EXPECT_EQ(status.ended_us(), 102'000'000);
  EXPECT_EQ(status.starts(), 1);
  EXPECT_FALSE(Conclude(Exited(WithLease(), "", 0, 9)).has_exit_code());
}

}  // namespace
}  // namespace itwin::agent

#include "agent/scheduler/verdict.h"

#include <signal.h>

#include "absl/strings/str_cat.h"

namespace itwin::agent {
namespace {

v1::EndCause CauseOf(const ExitedRecord& record) {
  if (record.cause == kCauseCancelled) return v1::END_CAUSE_CANCELLED;
  if (record.cause == kCauseTimeLimit) return v1::END_CAUSE_TIME_LIMIT;
  if (record.cause == kCauseLaunchFailed) return v1::END_CAUSE_LAUNCH_FAILED;
  if (record.cause == kCauseOutOfMemory) return v1::END_CAUSE_OUT_OF_MEMORY;
  if (record.cause == kCauseTerminated) return v1::END_CAUSE_CANCELLED_EXTERNALLY;
  return v1::END_CAUSE_EXITED;
}

// Somebody outside of the program ended it, and the record does not know who or why.
bool IsVague(const ExitedRecord& record) {
  return record.cause == kCauseTerminated ||
         (record.cause == kCauseSelf && (record.signal == SIGKILL || (record.signal == 0 && record.exit_code == 128 + SIGKILL)));
}

std::string FirstOf(const std::string& a, std::string b) { return a.empty() ? b : a; }

void EndByRecord(const Evidence& e, v1::AttemptStatus* status) {
  const ExitedRecord& record = *e.lifecycle.exited;
  status->set_phase(v1::ATTEMPT_PHASE_ENDED);
  status->set_cause(CauseOf(record));
  // A signal from outside was the scheduler's, where the scheduler says so (limit, preemption, memory).
  const bool explained = IsVague(record) && e.report.cause != v1::END_CAUSE_UNSPECIFIED;
  if (explained) status->set_cause(e.report.cause);
  if (record.signal == 0 && record.cause != kCauseLaunchFailed) status->set_exit_code(record.exit_code);
  status->set_signal(record.signal);
  status->set_cpu_seconds(record.cpu_seconds);
  status->set_max_rss_bytes(record.max_rss_bytes);
  status->set_ended_us(absl::ToUnixMicros(record.time));
  status->set_reason(FirstOf(
      record.message, record.signal != 0 ? absl::StrCat("ended by signal ", record.signal)
                                         : absl::StrCat("ended with exit code ", record.exit_code)));
  if (explained && !e.report.reason.empty()) status->set_reason(absl::StrCat(e.report.reason, "; ", status->reason()));
}

void End(v1::EndCause cause, std::string reason, v1::AttemptStatus* status) {
  status->set_phase(v1::ATTEMPT_PHASE_ENDED);
  status->set_cause(cause);
  status->set_reason(std::move(reason));
}

std::string CancelWords(const Evidence& e, absl::string_view when) {
  return absl::StrCat("cancelled ", when, e.cancel_reason.empty() ? "" : ": ", e.cancel_reason);
}

}  // namespace

v1::AttemptStatus Conclude(const Evidence& e) {
  v1::AttemptStatus status;
  status.set_attempt(e.key.text());
  status.set_scheduler_id(e.report.id);
  status.set_starts(static_cast<int>(e.lifecycle.started.size()));
  const bool started = !e.lifecycle.started.empty();
  if (started) {
    const StartedRecord& first = e.lifecycle.started.front();
    status.set_started_us(absl::ToUnixMicros(first.time));
    status.set_host(first.host);
    if (!first.scheduler_id.empty()) status.set_scheduler_id(first.scheduler_id);
  }
  if (!e.requested) {
    status.set_phase(v1::ATTEMPT_PHASE_ABSENT);
    if (e.cancelled) status.set_reason(CancelWords(e, "before it was sent here; it cannot start any more"));
    return status;
  }
  status.set_submitted_us(absl::ToUnixMicros(e.submitted));
  status.set_reason(e.report.reason);
  status.set_scheduler_state(e.report.word);
  for (const std::string& node : e.report.nodes) status.add_nodes(node);
  for (const std::string& node : e.report.bad_nodes) status.add_bad_nodes(node);

  if (e.lifecycle.exited && e.await_scheduler && IsVague(*e.lifecycle.exited) && e.report.state != SchedulerState::kEnded) {
    status.set_phase(v1::ATTEMPT_PHASE_RUNNING);
    status.set_reason("was ended from outside; the scheduler will say why");
  } else if (e.lifecycle.exited) {
    EndByRecord(e, &status);
  } else if (e.launch_error) {
    if (e.cancelled) {
      End(v1::END_CAUSE_CANCELLED, CancelWords(e, "before it began"), &status);
    } else {
      End(v1::END_CAUSE_LAUNCH_FAILED, *e.launch_error, &status);
    }
  } else {
    switch (e.report.state) {
      case SchedulerState::kEnded:
        if (e.report.cause != v1::END_CAUSE_UNSPECIFIED) {
          End(e.report.cause, FirstOf(e.report.reason, "ended by the scheduler"), &status);
        } else if (e.cancelled) {
          End(v1::END_CAUSE_CANCELLED, CancelWords(e, e.lease ? "and killed" : "before it began"), &status);
        } else if (e.lease) {
          End(v1::END_CAUSE_LOST,
              FirstOf(e.report.reason,
                      "its processes are gone without an exit record: killed from outside, or the machine restarted"),
              &status);
        } else {
          End(v1::END_CAUSE_LAUNCH_FAILED,
              FirstOf(e.report.reason, "the script ended before it had begun its work"), &status);
        }
        break;
      case SchedulerState::kAbsent:
        if (e.lease) {
          status.set_phase(v1::ATTEMPT_PHASE_UNKNOWN);
          status.set_reason("it was started, but the scheduler does not know it any more");
        } else if (e.cancelled) {
          End(v1::END_CAUSE_CANCELLED, CancelWords(e, "before it began"), &status);
        } else {
          status.set_phase(v1::ATTEMPT_PHASE_PENDING);
          status.set_reason(FirstOf(e.report.reason, "about to be given to the scheduler"));
        }
        break;
      case SchedulerState::kPending:
        if (e.report.expected_start && !started) status.set_expected_start_us(absl::ToUnixMicros(*e.report.expected_start));
        status.set_phase(started ? v1::ATTEMPT_PHASE_RUNNING : v1::ATTEMPT_PHASE_PENDING);
        break;
      case SchedulerState::kHeld:
        status.set_phase(v1::ATTEMPT_PHASE_HELD);
        break;
      case SchedulerState::kRunning:
        status.set_phase(started ? v1::ATTEMPT_PHASE_RUNNING : v1::ATTEMPT_PHASE_PENDING);
        if (!started) status.set_reason(FirstOf(e.report.reason, "starting"));
        break;
      case SchedulerState::kSuspended:
        status.set_phase(v1::ATTEMPT_PHASE_SUSPENDED);
        break;
      case SchedulerState::kUnknown:
        status.set_phase(started ? v1::ATTEMPT_PHASE_RUNNING : v1::ATTEMPT_PHASE_UNKNOWN);
        break;
    }
  }
  // A word of before the end is none of it.
  if (status.phase() == v1::ATTEMPT_PHASE_ENDED && e.report.state != SchedulerState::kEnded) status.clear_scheduler_state();
  if (e.cancelled && status.phase() != v1::ATTEMPT_PHASE_ENDED) {
    status.set_reason(CancelWords(e, "and being ended"));
  }
  return status;
}

}  // namespace itwin::agent

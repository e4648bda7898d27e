#include "common/job_state.h"

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace itwin {
namespace {

using S = JobState;

bool In(JobState state, std::initializer_list<JobState> states) {
  return std::find(states.begin(), states.end(), state) != states.end();
}

// The table of job_state.h: where `kind` leads from `from`, if it may happen there.
std::optional<JobState> Next(JobState from, EventKind kind) {
  const auto if_from = [from](std::initializer_list<JobState> states, JobState to) {
    return In(from, states) ? std::optional<JobState>(to) : std::nullopt;
  };
  switch (kind) {
    case EventKind::kSubmitted:
      return std::nullopt;  // only ever the first
    case EventKind::kPlaced:
      return if_from({S::kQueued}, S::kStaging);
    case EventKind::kStaged:
      return if_from({S::kStaging}, S::kSubmitting);
    case EventKind::kSubmitUnclear:
      return if_from({S::kSubmitting}, S::kSubmitUnknown);
    case EventKind::kAccepted:
      return if_from({S::kSubmitting, S::kSubmitUnknown, S::kStateUnknown}, S::kPending);
    case EventKind::kHeld:
      return if_from({S::kSubmitting, S::kSubmitUnknown, S::kPending, S::kStateUnknown}, S::kHeld);
    case EventKind::kReleased:
      return if_from({S::kHeld}, S::kPending);
    case EventKind::kStarted:
      return if_from({S::kSubmitting, S::kSubmitUnknown, S::kPending, S::kHeld, S::kStateUnknown,
                      S::kSuspended},
                     S::kRunning);
    case EventKind::kSuspended:
      return if_from({S::kRunning, S::kStateUnknown}, S::kSuspended);
    case EventKind::kStateUnclear:
      return if_from({S::kPending, S::kHeld, S::kRunning, S::kSuspended}, S::kStateUnknown);
    case EventKind::kEnded:
      return if_from({S::kSubmitting, S::kSubmitUnknown, S::kPending, S::kHeld, S::kRunning,
                      S::kSuspended, S::kStateUnknown},
                     S::kCollecting);
    case EventKind::kRequeued:
      return if_from({S::kStaging, S::kSubmitting, S::kSubmitUnknown, S::kCollecting}, S::kQueued);
    case EventKind::kSucceeded:
      return if_from({S::kCollecting}, S::kSucceeded);
    case EventKind::kFailed:
      return if_from({S::kQueued, S::kStaging, S::kSubmitting, S::kSubmitUnknown, S::kCollecting},
                     S::kFailed);
    case EventKind::kCancelled:
      return if_from({S::kQueued, S::kStaging, S::kSubmitting, S::kSubmitUnknown, S::kCollecting},
                     S::kCancelled);
    case EventKind::kCancelRequested:
      return IsFinal(from) ? std::nullopt : std::optional<JobState>(from);
    case EventKind::kTraceRequested:
      return if_from({S::kRunning}, from);
    case EventKind::kTraced:
      return if_from({S::kRunning, S::kSuspended, S::kStateUnknown}, from);
    case EventKind::kNote:
      return from;
  }
  return std::nullopt;
}

void CountRetry(const JobEvent& event, JobRecord* record) {
  switch (event.failure) {
    case FailureClass::kInfra:
      ++record->retries_infra;
      break;
    case FailureClass::kPreempted:
      ++record->retries_preempted;
      break;
    case FailureClass::kApp:
      ++record->retries_app;
      break;
    case FailureClass::kLimit:
      if (event.progress) record->retries_infra = 0;
      break;
    case FailureClass::kNone:
    case FailureClass::kUser:
    case FailureClass::kResource:
    case FailureClass::kUnknown:
      ++record->retries_other;
      break;
  }
  if (event.progress) {
    record->attempts_without_progress = 0;
  } else if (event.failure == FailureClass::kLimit) {
    ++record->attempts_without_progress;
  }
}

}  // namespace

bool IsFinal(JobState state) { return In(state, {S::kSucceeded, S::kFailed, S::kCancelled}); }

bool MayBeAtSite(JobState state) {
  return In(state, {S::kSubmitting, S::kSubmitUnknown, S::kPending, S::kHeld, S::kRunning,
                    S::kSuspended, S::kStateUnknown, S::kCollecting});
}

absl::string_view Name(JobState state) {
  switch (state) {
    case S::kQueued: return "QUEUED";
    case S::kStaging: return "STAGING";
    case S::kSubmitting: return "SUBMITTING";
    case S::kSubmitUnknown: return "SUBMIT_UNKNOWN";
    case S::kPending: return "PENDING";
    case S::kHeld: return "HELD";
    case S::kRunning: return "RUNNING";
    case S::kSuspended: return "SUSPENDED";
    case S::kStateUnknown: return "STATE_UNKNOWN";
    case S::kCollecting: return "COLLECTING";
    case S::kSucceeded: return "SUCCEEDED";
    case S::kFailed: return "FAILED";
    case S::kCancelled: return "CANCELLED";
  }
  return "?";
}

absl::string_view Name(EventKind kind) {
  switch (kind) {
    case EventKind::kSubmitted: return "submitted";
    case EventKind::kPlaced: return "placed";
    case EventKind::kStaged: return "staged";
    case EventKind::kSubmitUnclear: return "submit_unclear";
    case EventKind::kAccepted: return "accepted";
    case EventKind::kHeld: return "held";
    case EventKind::kReleased: return "released";
    case EventKind::kStarted: return "started";
    case EventKind::kSuspended: return "suspended";
    case EventKind::kStateUnclear: return "state_unclear";
    case EventKind::kEnded: return "ended";
    case EventKind::kRequeued: return "requeued";
    case EventKind::kSucceeded: return "succeeded";
    case EventKind::kFailed: return "failed";
    case EventKind::kCancelled: return "cancelled";
    case EventKind::kCancelRequested: return "cancel_requested";
    case EventKind::kNote: return "note";
    case EventKind::kTraceRequested: return "trace_requested";
    case EventKind::kTraced: return "traced";
  }
  return "?";
}

absl::string_view Name(FailureClass failure) {
  switch (failure) {
    case FailureClass::kNone: return "";
    case FailureClass::kUser: return "user";
    case FailureClass::kApp: return "app";
    case FailureClass::kResource: return "resource";
    case FailureClass::kLimit: return "limit";
    case FailureClass::kPreempted: return "preempted";
    case FailureClass::kInfra: return "infra";
    case FailureClass::kUnknown: return "unknown";
  }
  return "?";
}

std::string TraceName(int number) { return absl::StrCat("trace-", number, ".json"); }

const std::vector<JobState>& AllJobStates() {
  static const auto* const kAll = new std::vector<JobState>{
      S::kQueued, S::kStaging, S::kSubmitting, S::kSubmitUnknown, S::kPending, S::kHeld, S::kRunning,
      S::kSuspended, S::kStateUnknown, S::kCollecting, S::kSucceeded, S::kFailed, S::kCancelled};
  return *kAll;
}

const std::vector<EventKind>& AllEventKinds() {
  static const auto* const kAll = [] {
    auto* all = new std::vector<EventKind>;
    for (int i = 1; i <= static_cast<int>(EventKind::kTraced); ++i) all->push_back(static_cast<EventKind>(i));
    return all;
  }();
  return *kAll;
}

absl::Status ApplyFirst(const JobEvent& event, JobRecord* record) {
  if (event.kind != EventKind::kSubmitted) {
    return absl::FailedPreconditionError(absl::StrCat("a job begins with 'submitted', not '", Name(event.kind), "'"));
  }
  *record = JobRecord{};
  record->reason = event.message;
  return absl::OkStatus();
}

absl::Status Apply(const JobEvent& event, JobRecord* record) {
  const auto refuse = [&](absl::string_view why) {
    return absl::FailedPreconditionError(
        absl::StrCat("'", Name(event.kind), "' cannot happen in state ", Name(record->state), why));
  };
  const std::optional<JobState> next = Next(record->state, event.kind);
  if (!next) return refuse("");
  const bool placed = event.kind == EventKind::kPlaced;
  if (placed ? event.attempt != record->attempt + 1 : event.attempt != 0 && event.attempt != record->attempt) {
    return refuse(absl::StrCat(": attempt ", event.attempt, " is not ",
                               placed ? "the next" : "the newest", " (", record->attempt, ")"));
  }
  if (record->cancel_requested && (placed || event.kind == EventKind::kRequeued)) {
    return refuse(" after a cancel request");
  }
  if (event.kind == EventKind::kCancelled && !record->cancel_requested) {
    return refuse(" without a cancel request");
  }

  if (event.kind == EventKind::kTraceRequested && (record->trace_steps != 0 || event.steps <= 0)) {
    return refuse(event.steps <= 0 ? ": it names no steps" : " while another trace is wanted");
  }
  if (event.kind == EventKind::kTraced && record->trace_steps == 0) return refuse(": no trace is wanted");

  if (event.kind == EventKind::kNote) return absl::OkStatus();
  if (event.kind == EventKind::kTraceRequested) {
    record->trace_steps = event.steps;
    ++record->traces;
    return absl::OkStatus();
  }
  if (event.kind == EventKind::kTraced) {
    record->trace_steps = 0;
    return absl::OkStatus();
  }
  if (event.kind == EventKind::kCancelRequested) {
    record->cancel_requested = true;
    return absl::OkStatus();
  }
  record->state = *next;
  record->reason = event.message;
  if (placed) {
    record->attempt = event.attempt;
    record->site = event.site;
    record->not_before = absl::InfinitePast();
  }
  if (event.kind == EventKind::kRequeued) {
    record->not_before = event.not_before;
    CountRetry(event, record);
  }
  if (event.kind == EventKind::kEnded) record->trace_steps = 0;
  if (event.kind == EventKind::kFailed) record->failure = event.failure;
  return absl::OkStatus();
}

}  // namespace itwin

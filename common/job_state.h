#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

// The life of a job: every transition there is, in one pure function. The store records events and nothing
// else; a job's record is Apply() folded over its events, before and after a restart alike.
//
//   event            from                                              to
//   submitted        (none)                                            QUEUED
//   placed           QUEUED                                            STAGING        attempt += 1
//   staged           STAGING                                           SUBMITTING     intent recorded: may act now
//   submit_unclear   SUBMITTING                                        SUBMIT_UNKNOWN
//   accepted         SUBMITTING SUBMIT_UNKNOWN STATE_UNKNOWN           PENDING
//   held             SUBMITTING SUBMIT_UNKNOWN PENDING STATE_UNKNOWN   HELD
//   released         HELD                                              PENDING
//   started          SUBMITTING SUBMIT_UNKNOWN PENDING HELD
//                    STATE_UNKNOWN SUSPENDED                           RUNNING
//   suspended        RUNNING STATE_UNKNOWN                             SUSPENDED
//   state_unclear    PENDING HELD RUNNING SUSPENDED                    STATE_UNKNOWN
//   ended            SUBMITTING SUBMIT_UNKNOWN PENDING HELD RUNNING
//                    SUSPENDED STATE_UNKNOWN                           COLLECTING     on evidence only
//   requeued         STAGING SUBMITTING SUBMIT_UNKNOWN COLLECTING      QUEUED         next attempt, after not_before
//   succeeded        COLLECTING                                        SUCCEEDED      final
//   failed           QUEUED STAGING SUBMITTING SUBMIT_UNKNOWN
//                    COLLECTING                                        FAILED         final
//   cancelled        QUEUED STAGING SUBMITTING SUBMIT_UNKNOWN
//                    COLLECTING                                        CANCELLED      final; needs cancel_requested
//   cancel_requested every state that is not final                     unchanged      sets cancel_requested
//   trace_requested  RUNNING                                           unchanged      traces += 1; not while one is wanted
//   traced           RUNNING SUSPENDED STATE_UNKNOWN                   unchanged      none is wanted any more
//   note             every state                                       unchanged      something worth telling
//
// A trace that is wanted when its attempt ends is not waited for: what the program has written of it comes with the outputs.
//
// Budgets: a requeue counts by its failure class. A continuation (class limit) counts nowhere; one that made progress gives
// the infra budget back, so that a chain of a hundred attempts may meet more than a handful of bad nodes.
//
// requeued after cancel_requested is refused: cancel wins over retry. From SUBMITTING and SUBMIT_UNKNOWN, `requeued`,
// `failed` and `cancelled` mean that the site has said the attempt does not exist and never will.
namespace itwin {

enum class JobState {  // stored; never renumbered; the numbers of itwin.v1.JobState
  kQueued = 1,
  kStaging = 2,
  kSubmitting = 3,
  kSubmitUnknown = 4,
  kPending = 5,
  kHeld = 6,
  kRunning = 7,
  kSuspended = 8,
  kStateUnknown = 9,
  kCollecting = 10,
  kSucceeded = 11,
  kFailed = 12,
  kCancelled = 13,
};

enum class FailureClass {  // stored; the numbers of itwin.v1.FailureClass
  kNone = 0,
  kUser = 1,
  kApp = 2,
  kResource = 3,
  kLimit = 4,
  kPreempted = 5,
  kInfra = 6,
  kUnknown = 7,
};

enum class EventKind {  // stored; never renumbered
  kSubmitted = 1,
  kPlaced = 2,
  kStaged = 3,
  kSubmitUnclear = 4,
  kAccepted = 5,
  kHeld = 6,
  kReleased = 7,
  kStarted = 8,
  kSuspended = 9,
  kStateUnclear = 10,
  kEnded = 11,
  kRequeued = 12,
  kSucceeded = 13,
  kFailed = 14,
  kCancelled = 15,
  kCancelRequested = 16,
  kNote = 17,
  kTraceRequested = 18,
  kTraced = 19,
};

// What happened, as it is stored.
struct JobEvent {
  EventKind kind = EventKind::kNote;
  absl::Time time;
  int attempt = 0;       // the attempt it concerns; 0 for none. A stale attempt is refused.
  std::string message;   // one sentence for people
  std::string actor;     // "user:<token name>", "gateway", "site:<name>"
  FailureClass failure = FailureClass::kNone;  // requeued, failed
  std::string site;                            // placed
  absl::Time not_before = absl::InfinitePast();  // requeued: back-off
  bool progress = false;                         // requeued: this attempt got further than the one before
  int64_t steps = 0;                             // trace_requested: how many to trace
};

// Everything that decisions about a job depend on.
struct JobRecord {
  JobState state = JobState::kQueued;
  int attempt = 0;            // newest; 0 before the first placement
  bool cancel_requested = false;
  std::string site;           // of the newest attempt
  std::string reason;         // message of the last event that moved the job
  FailureClass failure = FailureClass::kNone;  // in kFailed
  absl::Time not_before = absl::InfinitePast();
  int retries_infra = 0;      // requeued events so far, by class; infra since the last continuation that made progress
  int retries_preempted = 0;
  int retries_app = 0;
  int retries_other = 0;      // all but continuations
  int attempts_without_progress = 0;  // in a row, of continuations
  int64_t trace_steps = 0;    // of the trace that is wanted now; 0: none is
  int traces = 0;             // asked for so far

  friend bool operator==(const JobRecord&, const JobRecord&) = default;
};

bool IsFinal(JobState state);
// The attempt may exist at the site.
bool MayBeAtSite(JobState state);
absl::string_view Name(JobState state);      // "QUEUED"
absl::string_view Name(EventKind kind);      // "submitted"
absl::string_view Name(FailureClass failure);  // "infra"; "" for kNone

// The first event of a job. kFailedPrecondition unless it is `submitted`.
absl::Status ApplyFirst(const JobEvent& event, JobRecord* record);
// Moves `record`; on error (kFailedPrecondition, naming state and event) it is unchanged.
absl::Status Apply(const JobEvent& event, JobRecord* record);

// Output file of the job's `number`-th trace that was asked for: "trace-1.json".
std::string TraceName(int number);

// All values, for tests and prompts.
const std::vector<JobState>& AllJobStates();
const std::vector<EventKind>& AllEventKinds();

}  // namespace itwin

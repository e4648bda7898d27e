#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/ids.h"
#include "common/job_state.h"
#include "itwin/agent/v1/agent.pb.h"
#include "server/store/job_rows.h"

// What to do next about a job, from what is stored, what its site last said and the time: pure and idempotent. Asked
// again with the same snapshot it answers the same; the dispatcher records events and runs errands, never decides.
//
//   our state        the site says            cancel?  action
//   QUEUED           -                        yes      record cancelled           (placement is plan_placement.h)
//   STAGING          -                        yes      record cancelled
//   STAGING          inputs are there         no       record staged (the intent), else stage them; no room: requeued
//   SUBMITTING and   nothing yet, ABSENT      no       start (idempotent); unclear: submit_unclear, then again;
//   SUBMIT_UNKNOWN                                     refused: cancel, which bars the attempt; barred: failed
//                    nothing yet, ABSENT      yes      cancel; it answers ABSENT, and so bars the attempt: cancelled
//   at the site      PENDING HELD RUNNING     -        record accepted, held, released, started, suspended
//                    SUSPENDED
//   at the site      UNKNOWN                  -        record state_unclear
//   at the site      ENDED                    -        record (started,) ended
//   at the site      ABSENT, twice            -        record ended: lost
//   at the site      any but ENDED            yes      cancel, again every kCancelInterval
//   RUNNING          RUNNING                  no       a trace is wanted: ask for it, again every kTraceInterval, until it
//                                                      is here: traced
//   COLLECTING       ENDED                    -        collect; then by the verdict: succeeded, failed, requeued, cancelled
//   COLLECTING       ABSENT, twice            -        verdict "lost"
//   any              not connected            -        nothing changes
//
// The verdict, by what the attempt left (a wish to cancel wins over every `requeued`, a whole result over a cancel):
//
//   class      comes from                                   then
//   -          exit 0, result record, outputs here          succeeded
//   user       exit 2, refused, cannot be started           failed
//   app        other exit codes and signals                 requeued within retry.app (default 0): 1 s, 4 s, 16 s ... 5 min
//   resource   exit 4, out of memory                        failed; no room for inputs: waits, as app does
//   limit      exit 85, "saved"; the time limit             requeued at once from the newest checkpoint; failed after two in a
//                                                           row without progress, and when there is no checkpoint at all
//   limit      the scheduler's deadline                     failed
//   preempted  the scheduler                                requeued within retry.preempted (default 100) after 1 s
//   infra      node, spool, lost processes, and any app     requeued within retry.infra (default 3), as app does, away
//              whose last lines show broken hardware        from the nodes that failed it
//   unknown    cancelled by somebody else, no cause known   failed
namespace itwin::server {

// ABSENT is believed after it was said twice, this far apart, for an attempt that the site once knew.
inline constexpr int kAbsencesNeeded = 2;
inline constexpr absl::Duration kAbsencesApart = absl::Seconds(2);
inline constexpr absl::Duration kCancelInterval = absl::Seconds(10);
inline constexpr absl::Duration kTraceInterval = absl::Seconds(1);
inline constexpr int kDefaultInfraRetries = 3;
inline constexpr int kDefaultPreemptedRetries = 100;
inline constexpr int kDefaultAppRetries = 0;
inline constexpr int kMaxTriesOnDamage = 3;
inline constexpr absl::Duration kFirstBackoff = absl::Seconds(1);
inline constexpr absl::Duration kMaxBackoff = absl::Minutes(5);
inline constexpr size_t kMaxReasonBytes = 2000;

// Something the dispatcher does at the site on a job's behalf, maybe several times until it works.
struct Errand {
  bool under_way = false;
  bool done = false;
  int failures = 0;                               // in a row
  absl::Status last;                              // of the last failure
  absl::Time not_before = absl::InfinitePast();   // of the next try
};

// What came back from an attempt that has ended.
struct Collected {
  std::vector<v1::OutputFile> outputs;  // all here, hashes checked
  std::string stderr_tail;              // for the reason, and for what it says about nodes (failure_signs.h)
};

struct JobSnapshot {
  // Stored.
  JobId id;
  JobRecord record;
  bool train = false;
  v1::RetryPolicy retry;
  int64_t max_step = 0;         // largest step seen of the newest attempt
  int64_t max_step_before = 0;  // of those before
  bool older_checkpoint = false;  // there is one that does not come from the newest attempt
  // Of the newest attempt, by this connection. Not connected: no value, and no errands.
  bool connected = false;
  std::optional<agent::v1::AttemptStatus> seen;  // the newest that is not ABSENT; ENDED stays
  int absences = 0;  // ABSENT in a row since then
  absl::Time first_absence = absl::InfiniteFuture();
  absl::Time last_absence = absl::InfinitePast();
  bool drained = false;  // ENDED, and its files are stored up to their final sizes
  bool barred = false;   // CancelAttempt has answered ABSENT
  std::optional<Collected> collected;
  std::optional<v1::OutputFile> trace;  // the one that is wanted, when it is here
  Errand staging, start, cancel, collect, tracing;
  double jitter = 0.5;  // 0..1, drawn by the caller: spreads retries
};

// Appends an event with what is new about the attempt.
struct Record {
  JobEvent event;
  AttemptUpdate update;
};
struct StageInputs {};
struct StartTheAttempt {};
struct CancelTheAttempt {};
struct CollectOutputs {};
struct TakeTrace {};
using Action = std::variant<Record, StageInputs, StartTheAttempt, CancelTheAttempt, CollectOutputs, TakeTrace>;

// Records come alone (apply them in order, then ask again), errands otherwise.
std::vector<Action> Reconcile(const JobSnapshot& job, absl::Time now);

// ---- parts of it, for their own tests ----

// A whole result record of docs/worker-contract.md.
struct ResultRecord {
  std::string outcome;  // "succeeded", "failed", "saved"
  std::string message;
  std::map<std::string, double> metrics;
  int64_t steps = 0;
  std::vector<v1::OutputFile> outputs;
  FailureClass failure = FailureClass::kNone;
  std::optional<int64_t> rank;
  std::optional<int64_t> step;
  std::string host;
};
// kDataLoss saying what is wrong with it, also when it is the record of another attempt.
absl::StatusOr<ResultRecord> ParseResult(const std::string& json, const AttemptKey& attempt);

// The 0-based `retry`-th wait: 1 s, 4 s, 16 s ... at most 5 min, scaled by 0.5 + jitter.
absl::Duration Backoff(int retry, double jitter);

// The attempt a new attempt goes on from: the newest before `number` that left a checkpoint, else `first`.
std::string ResumeFrom(const JobId& job, const std::vector<AttemptRow>& attempts, int number,
                       const std::optional<AttemptKey>& first);

// Why it waits, for people: the scheduler's reason in words, and when it expects to start it.
std::string WaitingWords(const agent::v1::AttemptStatus& status, absl::Time now);

// The site's facts as the store keeps them.
AttemptUpdate UpdateFrom(const agent::v1::AttemptStatus& status);

// The start call was refused for good; anything else that is not OK leaves open what happened.
bool IsRefusal(const absl::Status& status);

}  // namespace itwin::server

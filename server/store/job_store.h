#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/ids.h"
#include "common/job_state.h"
#include "itwin/agent/v1/agent.pb.h"
#include "itwin/v1/jobs.pb.h"
#include "itwin/v1/spec.pb.h"
#include "server/store/job_rows.h"

namespace itwin::server {

// The gateway's durable truth: jobs, their events and attempts, metric points, logs and outputs.
//
// Writes return when they are on disk, whole or not at all, and many at once share one commit. The store takes
// events, never states: a job's record is Apply() folded over its events.
// Thread-safe; reads never wait for writes. Errors beside those named below:
//   kResourceExhausted  disk full, or too many writes wait; nothing of the write was kept. Again when there is room
//   kUnavailable        the disk answers with errors, or the store is closed
//   kDataLoss           a stored row cannot be read
class JobStore {
 public:
  virtual ~JobStore() = default;

  // ---- writes ----

  // Job and first event in one. The same owner and request id again: with the same content the job of that time
  // (existed), with another kAlreadyExists. Owner's live jobs at the limit: kResourceExhausted.
  virtual absl::StatusOr<Submitted> Submit(const NewJob& job) = 0;
  // The job that Submit would answer with `existed`; nothing when the owner has not used the request id. Writes nothing.
  virtual absl::StatusOr<std::optional<JobRow>> FindSubmitted(const NewJob& job) = 0;
  // Applies the event to the job and records it, together with what is new about the attempt that the event names
  // (or, for attempt 0, about the newest). kNotFound; kFailedPrecondition when the table does not allow it: nothing is
  // recorded then. `placed` makes the attempt's row. event.time unset: now.
  virtual absl::StatusOr<JobRow> AppendEvent(const JobId& job, const JobEvent& event,
                                             const AttemptUpdate& update = {}) = 0;
  // New facts about an attempt that move nothing. kNotFound.
  virtual absl::Status UpdateAttempt(const AttemptKey& attempt, const AttemptUpdate& update) = 0;
  // What was read from spools, and the new offsets, in one transaction. A batch that does not begin where the stored
  // cursor of its file stands is left out (kSkipped, with that cursor), one of an attempt that is not known too
  // (kUnknownAttempt): so a range of a spool counts exactly once. One result per batch, in order.
  virtual absl::StatusOr<std::vector<SpoolCommit>> CommitSpool(const std::vector<SpoolBatch>& batches) = 0;

  // Removes up to `limit` finished jobs that ended before `before`, oldest first, with all that is stored of them, each in a
  // write of its own. Returns how many. Artifacts are not the store's.
  virtual absl::StatusOr<int> RemoveFinished(absl::Time before, int limit) = 0;

  // The spool that serves a site: returns the one that is known, which is this one when there was none.
  virtual absl::StatusOr<std::string> PinSpool(const std::string& site, const std::string& spool_id) = 0;
  // The next spool that the site shows is its own. kNotFound when none is known.
  virtual absl::Status ForgetSpool(const std::string& site) = 0;

  // ---- reads ----

  // kNotFound.
  virtual absl::StatusOr<JobRow> GetJob(const JobId& job) = 0;
  virtual absl::StatusOr<v1::JobSpec> GetSpec(const JobId& job) = 0;
  // A full id or a prefix of at least 4 hex digits. kNotFound; several fit: kFailedPrecondition naming some;
  // kInvalidArgument when it is no prefix of an id.
  // With an owner, only that owner's jobs are looked at.
  virtual absl::StatusOr<JobId> ResolveJob(absl::string_view prefix, absl::string_view owner = "") = 0;
  // Newest first. kInvalidArgument for a page token that is not ours.
  virtual absl::StatusOr<JobPage> ListJobs(const JobFilter& filter) = 0;
  // Every job that is not final and whose version is larger than `after_version`, oldest version first. With a site:
  // only jobs whose newest attempt is there (QUEUED jobs before their first placement have none).
  virtual absl::StatusOr<std::vector<JobRow>> ListLive(absl::string_view site = "", int64_t after_version = 0) = 0;
  virtual absl::StatusOr<int64_t> CountLive(absl::string_view owner = "") = 0;

  // From 1, in order; empty before the first placement. kNotFound for an unknown job.
  virtual absl::StatusOr<std::vector<AttemptRow>> ListAttempts(const JobId& job) = 0;
  virtual absl::StatusOr<AttemptRow> GetAttempt(const AttemptKey& attempt) = 0;
  virtual absl::StatusOr<std::vector<StoredEvent>> ListEvents(const JobId& job, int64_t after_sequence, int limit) = 0;
  virtual absl::StatusOr<std::vector<v1::OutputFile>> ListOutputs(const JobId& job) = 0;

  // Points after `cursor` in commit order, about `limit` of them. Patterns as in itwin.v1.ListPointsRequest.
  virtual absl::StatusOr<PointsPage> ListPoints(const JobId& job, int64_t cursor,
                                                const std::vector<std::string>& patterns, int limit) = 0;
  virtual absl::StatusOr<std::vector<v1::SeriesBuckets>> QuerySeries(const JobId& job,
                                                                     const std::vector<std::string>& patterns,
                                                                     int buckets) = 0;
  // attempt 0: the newest. Negative offset: from the end. kNotFound before the first attempt or for one that is not.
  virtual absl::StatusOr<LogSlice> ReadLog(const JobId& job, int attempt, v1::LogStream stream, int64_t offset,
                                           int limit) = 0;

  // ---- wake-ups ----

  // Calls the listener after each commit, on the store's writer thread: it must only take note. The listener must
  // outlive the store or be removed; after RemoveListener returns it is not called any more.
  virtual void AddListener(CommitListener* listener) = 0;
  virtual void RemoveListener(CommitListener* listener) = 0;
};

}  // namespace itwin::server

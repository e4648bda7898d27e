#pragma once

#include <memory>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/ids.h"
#include "common/job_state.h"
#include "server/artifacts/blob_store.h"
#include "server/store/sqlite_job_store.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

// Stores and rows that tests of the gateway share.
namespace itwin::server::testing {

inline std::unique_ptr<SqliteJobStore> OpenStore(const std::string& path, SqliteJobStore::Options options = {}) {
  options.path = path;
  absl::StatusOr<std::unique_ptr<SqliteJobStore>> store = SqliteJobStore::Open(options);
  if (!store.ok()) ADD_FAILURE() << store.status();
  ITWIN_CHECK(store.ok());
  return *std::move(store);
}

inline std::unique_ptr<BlobStore> OpenBlobs(const std::string& directory) {
  absl::StatusOr<std::unique_ptr<BlobStore>> blobs = BlobStore::Open({.directory = directory, .min_free_bytes = 0});
  if (!blobs.ok()) ADD_FAILURE() << blobs.status();
  ITWIN_CHECK(blobs.ok());
  return *std::move(blobs);
}

inline NewJob MakeJob(const std::string& request_id, const std::string& owner = "ada", const std::string& name = "job") {
  NewJob job;
  job.owner = owner;
  job.request_id = request_id;
  job.spec.set_name(name);
  job.spec.mutable_command()->add_argv("true");
  return job;
}

inline JobEvent Event(EventKind kind, int attempt = 0, const std::string& message = "") {
  JobEvent event;
  event.kind = kind;
  event.attempt = attempt;
  event.message = message.empty() ? std::string(Name(kind)) : message;
  event.actor = "gateway";
  if (kind == EventKind::kPlaced) event.site = "local";
  if (kind == EventKind::kFailed) event.failure = FailureClass::kApp;
  if (kind == EventKind::kRequeued) event.failure = FailureClass::kInfra;
  return event;
}

// Submits a job and brings its first attempt to RUNNING.
inline JobRow RunningJob(JobStore& store, const NewJob& job) {
  absl::StatusOr<Submitted> submitted = store.Submit(job);
  ITWIN_CHECK(submitted.ok());
  absl::StatusOr<JobRow> row = submitted->job;
  for (const EventKind kind : {EventKind::kPlaced, EventKind::kStaged, EventKind::kAccepted, EventKind::kStarted}) {
    row = store.AppendEvent(submitted->job.id, Event(kind, 1));
    ITWIN_CHECK(row.ok());
  }
  return *row;
}
inline JobRow RunningJob(JobStore& store, const std::string& request_id, const std::string& owner = "ada",
                         const std::string& name = "job") {
  return RunningJob(store, MakeJob(request_id, owner, name));
}

inline SpoolBatch MetricsBatch(const AttemptKey& attempt, int64_t begin, int64_t end) {
  SpoolBatch batch;
  batch.attempt = attempt;
  batch.file = agent::v1::SPOOL_FILE_METRICS;
  batch.begin_offset = begin;
  batch.end_offset = end;
  return batch;
}

inline SpoolBatch LogBatch(const AttemptKey& attempt, int64_t begin, const std::string& bytes) {
  SpoolBatch batch;
  batch.attempt = attempt;
  batch.file = agent::v1::SPOOL_FILE_STDOUT;
  batch.begin_offset = begin;
  batch.end_offset = begin + static_cast<int64_t>(bytes.size());
  batch.log = bytes;
  return batch;
}

}  // namespace itwin::server::testing

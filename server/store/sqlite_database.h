#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "common/files.h"
#include "server/store/commit_queue.h"
#include "server/store/sqlite_connection.h"

namespace itwin::server {

// The file: its schema, its one writer and its readers. Thread-safe.
class SqliteDatabase {
 public:
  struct Options {
    std::string path;
    int readers = 4;
    int max_waiting_writes = 4096;
    int64_t max_bytes = 0;  // 0: no limit
    bool exclusive = true;
    std::function<void()> on_rollback;  // see CommitQueue::Hooks
  };
  // As SqliteJobStore::Open.
  static absl::StatusOr<std::unique_ptr<SqliteDatabase>> Open(const Options& options);
  ~SqliteDatabase();

  absl::Status Write(CommitQueue::Body body) { return queue_->Run(body); }
  // Runs the body on a connection of its own, in one snapshot. Waits while all readers are busy.
  absl::Status Read(absl::FunctionRef<absl::Status(SqliteConnection&)> body) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status Backup(const std::string& path);

  void AddListener(CommitListener* listener) ABSL_LOCKS_EXCLUDED(listeners_mu_);
  void RemoveListener(CommitListener* listener) ABSL_LOCKS_EXCLUDED(listeners_mu_);

  const std::string& gateway_id() const { return gateway_id_; }
  const CommitQueue& queue() const { return *queue_; }

 private:
  explicit SqliteDatabase(const Options& options) : options_(options) {}
  absl::Status Prepare();
  bool HasReader() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !free_readers_.empty(); }

  const Options options_;
  FileDescriptor lock_;
  std::string gateway_id_;
  std::unique_ptr<SqliteConnection> writer_;  // the queue's

  absl::Mutex mu_;
  std::vector<std::unique_ptr<SqliteConnection>> free_readers_ ABSL_GUARDED_BY(mu_);

  absl::Mutex listeners_mu_;
  std::vector<CommitListener*> listeners_ ABSL_GUARDED_BY(listeners_mu_);

  std::unique_ptr<CommitQueue> queue_;  // last: its thread uses the rest
};

}  // namespace itwin::server

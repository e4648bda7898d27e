#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "server/store/job_rows.h"
#include "server/store/sqlite_connection.h"

namespace itwin::server {

// What one body writes with.
struct WriteContext {
  SqliteConnection& connection;
  std::vector<JobChange> changes;  // told to listeners when it is on disk
};

// The only writer. Callers hand in bodies and wait; one thread runs all that wait in one transaction and commits once for
// all. A failing body takes back its own writes only; for that the group may be run a second time, so a body may be called
// twice and must set what it returns anew. Group commit: while one commit waits for the disk, the next group gathers.
class CommitQueue {
 public:
  using Body = absl::FunctionRef<absl::Status(WriteContext&)>;
  struct Hooks {
    std::function<void(absl::Span<const JobChange>)> on_commit;  // writer thread, before the callers are woken
    std::function<void()> on_rollback;  // writer thread, each time something that a body wrote was taken back
  };

  // `connection` must outlive the queue and be used by nobody else.
  CommitQueue(SqliteConnection* connection, int max_waiting, Hooks hooks);
  ~CommitQueue();  // runs what waits

  // Returns what the body returned once it is durable. A body's error or kResourceExhausted (queue or disk full) and
  // kUnavailable (disk errors): nothing of it is stored.
  absl::Status Run(Body body) ABSL_LOCKS_EXCLUDED(mu_);

  int64_t writes() const ABSL_LOCKS_EXCLUDED(mu_);
  int64_t commits() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Item {
    explicit Item(Body b) : body(b) {}
    Body body;
    absl::Status status;
    absl::Notification done;
  };
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_ || !waiting_.empty(); }
  void Loop();
  void RunGroup(const std::vector<Item*>& group);
  struct Outcome {
    bool any = false;        // a body wrote
    bool took_back = false;  // a body's writes were taken back
    bool again = false;      // they can only be taken back with all the others
    absl::Status fatal;      // the transaction is lost
  };
  // Begins a transaction and runs the bodies in it, with `alone` each in a savepoint.
  Outcome RunBodies(const std::vector<Item*>& group, bool alone, std::vector<JobChange>* changes);
  absl::Status Execute(const char* sql);

  SqliteConnection* const connection_;
  const size_t max_waiting_;
  const Hooks hooks_;

  mutable absl::Mutex mu_;
  std::deque<Item*> waiting_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  int64_t writes_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t commits_ ABSL_GUARDED_BY(mu_) = 0;

  std::thread thread_;  // last: it uses the rest
};

}  // namespace itwin::server

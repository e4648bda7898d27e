#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "common/ids.h"
#include "itwin/v1/jobs.pb.h"
#include "server/store/job_store.h"

namespace itwin::server {

// How often something of a job has changed, by kind, since somebody began to watch it: a watcher that has seen the
// numbers need not read.
struct ChangeCounts {
  uint64_t job = 0;  // events, progress, summary
  uint64_t events = 0;
  uint64_t points = 0;
  uint64_t logs = 0;
  friend bool operator==(const ChangeCounts&, const ChangeCounts&) = default;
};

// A job that is watched, shared by its watchers.
class WatchTopic {
 public:
  // `shared_bytes` counts what all topics keep; it must outlive them.
  explicit WatchTopic(std::atomic<int64_t>* shared_bytes) : shared_bytes_(*shared_bytes) {}
  ~WatchTopic();

  ChangeCounts counts() const ABSL_LOCKS_EXCLUDED(mu_);
  void Count(const JobChange& change) ABSL_LOCKS_EXCLUDED(mu_);

  // The newest updates that some watcher was sent, so that watchers at the same place share one read. An entry is right
  // for ever (what it holds has been committed), though not always the newest.
  struct Shared {
    v1::WatchCursor from;
    bool points = false, logs = false;
    uint64_t job_seen = 0;     // counts().job that the watcher had been told about; 0: nothing
    ChangeCounts seen;         // what the update brings the watcher to
    bool more = false;         // there was more to read at once
    bool finished = false;     // the job's last
    std::shared_ptr<const v1::JobUpdate> update;  // null: nothing new
    int64_t bytes = 0;         // of the update
  };
  // Finds an entry for the same place, or makes it by `read`; other watchers of the job wait meanwhile.
  absl::StatusOr<Shared> GetOrRead(const Shared& key, const std::function<absl::StatusOr<Shared>()>& read)
      ABSL_LOCKS_EXCLUDED(read_mu_);

 private:
  mutable absl::Mutex mu_;
  ChangeCounts counts_ ABSL_GUARDED_BY(mu_);
  void DropOldest() ABSL_EXCLUSIVE_LOCKS_REQUIRED(read_mu_);
  std::atomic<int64_t>& shared_bytes_;
  absl::Mutex read_mu_;
  std::deque<Shared> recent_ ABSL_GUARDED_BY(read_mu_);
};

// Tells watchers that something of their job was committed. It carries no data: watchers hold cursors and read from the
// store, so a slow one costs nothing. Thread-safe.
class EventHub : public CommitListener {
 public:
  using Wake = std::function<void()>;
  // Gives the subscription back at its end; afterwards `wake` is not called any more.
  class Subscription {
   public:
    ~Subscription();
    Subscription(const Subscription&) = delete;
    Subscription& operator=(const Subscription&) = delete;
    WatchTopic& topic() { return *topic_; }

   private:
    friend class EventHub;
    Subscription(EventHub* hub, JobId job, std::shared_ptr<WatchTopic> topic, uint64_t number)
        : hub_(hub), job_(std::move(job)), topic_(std::move(topic)), number_(number) {}
    EventHub* const hub_;
    const JobId job_;
    const std::shared_ptr<WatchTopic> topic_;
    const uint64_t number_;
  };

  explicit EventHub(int max_watchers) : max_watchers_(max_watchers) {}
  // Calls `wake` after each commit that changes the job, on the store's writer thread: it must only take note, and not
  // call the hub. kResourceExhausted: too many watchers; kUnavailable: closed.
  absl::StatusOr<std::unique_ptr<Subscription>> Subscribe(const JobId& job, Wake wake) ABSL_LOCKS_EXCLUDED(mu_);
  void OnCommit(absl::Span<const JobChange> changes) override ABSL_LOCKS_EXCLUDED(mu_);
  // The gateway stops: wakes all, and they find closed().
  void Close() ABSL_LOCKS_EXCLUDED(mu_);
  bool closed() const { return closed_.load(); }
  int watchers() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Watched {
    std::shared_ptr<WatchTopic> topic;
    std::vector<std::pair<uint64_t, Wake>> wakes;
  };
  void Unsubscribe(const JobId& job, uint64_t number) ABSL_LOCKS_EXCLUDED(mu_);

  const int max_watchers_;
  std::atomic<bool> closed_ = false;
  std::atomic<int64_t> shared_bytes_ = 0;
  mutable absl::Mutex mu_;
  absl::flat_hash_map<JobId, Watched> jobs_ ABSL_GUARDED_BY(mu_);
  uint64_t next_number_ ABSL_GUARDED_BY(mu_) = 1;
  int watchers_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace itwin::server

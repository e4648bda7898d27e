#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/clock.h"
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

  // A round of telling watchers begins with what has changed; it is over when most of those have rested that had when it
  // began. So one that does not take its updates holds up a single round.
  void BeginRound(const JobChange& change) ABSL_LOCKS_EXCLUDED(mu_);
  ChangeCounts counts() const ABSL_LOCKS_EXCLUDED(mu_);
  uint64_t round() const ABSL_LOCKS_EXCLUDED(mu_);

  // What a watcher knows of rounds: the last one in which it rested.
  using Rounds = std::optional<uint64_t>;
  enum class Rest { kNews, kRests, kEndsRound };
  // A watcher has been sent everything up to `seen`.
  Rest Rested(const ChangeCounts& seen, Rounds* rounds) ABSL_LOCKS_EXCLUDED(mu_);
  // A watcher goes away. True: the round is over now.
  bool Left(const Rounds& rounds) ABSL_LOCKS_EXCLUDED(mu_);

  // The newest updates that some watcher was sent, so that watchers at the same place share one read. An entry is right
  // for ever (what it holds has been committed), though not always the newest.
  struct Shared {
    v1::WatchCursor from;
    bool points = false, logs = false;
    uint64_t job_seen = 0;     // counts().job that the watcher had been told about; 0: nothing
    ChangeCounts seen;         // what the update brings the watcher to
    bool more = false;         // there was more to read at once
    bool finished = false;     // the job's last
    v1::WatchCursor to;        // the update's cursor
    bool tells_job = false;    // the update has the job
    // The v1::JobUpdate as it goes over the wire, the same bytes for all; null: nothing new.
    std::shared_ptr<const std::string> update;
  };
  // Finds an entry for the same place, or makes it by `read`; other watchers of the job wait meanwhile.
  absl::StatusOr<Shared> GetOrRead(const Shared& key, const std::function<absl::StatusOr<Shared>()>& read)
      ABSL_LOCKS_EXCLUDED(read_mu_);

 private:
  bool RoundIsOver() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  mutable absl::Mutex mu_;
  ChangeCounts counts_ ABSL_GUARDED_BY(mu_);
  uint64_t round_ ABSL_GUARDED_BY(mu_) = 0;
  int expected_ ABSL_GUARDED_BY(mu_) = 0;  // had rested when the round began
  int rested_ ABSL_GUARDED_BY(mu_) = 0;    // since
  bool over_ ABSL_GUARDED_BY(mu_) = true;

  void DropOldest() ABSL_EXCLUSIVE_LOCKS_REQUIRED(read_mu_);
  std::atomic<int64_t>& shared_bytes_;
  absl::Mutex read_mu_;
  std::deque<Shared> recent_ ABSL_GUARDED_BY(read_mu_);
};

// Tells watchers that something of their job was committed. It carries no data: watchers hold cursors and read from the
// store, so a slow one costs nothing. Thread-safe.
// The watchers of a job are told in rounds. The next round waits until the last one has been delivered, and then half as long
// again, so that deliveries take two thirds of the time at most, however fast the machine is; what is committed meanwhile
// goes out in one update. Otherwise a thousand watchers of a busy job would take all processors for updates of a point or
// two, and all would be late. Few watchers are told within the commit.
class EventHub : public CommitListener {
 public:
  using Wake = std::function<void()>;
  struct Options {
    int max_watchers = 10'000;
    absl::Duration longest_round = absl::Milliseconds(250);  // the next begins even if this one is not delivered
  };
  // Gives the subscription back at its end; afterwards `wake` is not called any more.
  class Subscription {
   public:
    ~Subscription();
    Subscription(const Subscription&) = delete;
    Subscription& operator=(const Subscription&) = delete;
    WatchTopic& topic() { return *topic_; }
    // The watcher has been sent everything up to `seen`. True: it rests, and `wake` will be called. False: there is more.
    // One thread at a time.
    bool Rest(const ChangeCounts& seen);

   private:
    friend class EventHub;
    Subscription(EventHub* hub, JobId job, std::shared_ptr<WatchTopic> topic, uint64_t number)
        : hub_(hub), job_(std::move(job)), topic_(std::move(topic)), number_(number) {}
    EventHub* const hub_;
    const JobId job_;
    const std::shared_ptr<WatchTopic> topic_;
    const uint64_t number_;
    WatchTopic::Rounds rounds_;
  };

  // `clock` must outlive the hub.
  EventHub(const Options& options, Clock* clock);
  ~EventHub() override;
  // Calls `wake` after commits that change the job, on the store's writer thread or the hub's: it must only take note, and
  // not call the hub. kResourceExhausted: too many watchers; kUnavailable: closed.
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
    absl::Time round_began = absl::InfinitePast();
    absl::Time next_round = absl::InfinitePast();  // not before
    std::optional<JobChange> waiting;              // committed since the last round
  };
  void Unsubscribe(const JobId& job, uint64_t number, const WatchTopic::Rounds& rounds) ABSL_LOCKS_EXCLUDED(mu_);
  void EndRound(const JobId& job, uint64_t round) ABSL_LOCKS_EXCLUDED(mu_);
  void EndRound(Watched* watched) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Tell(Watched* watched, const JobChange& change, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool HasWork() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return closed_ || reschedule_; }
  void Loop() ABSL_LOCKS_EXCLUDED(mu_);

  const Options options_;
  Clock& clock_;
  std::atomic<bool> closed_ = false;
  std::atomic<int64_t> shared_bytes_ = 0;
  mutable absl::Mutex mu_;
  absl::flat_hash_map<JobId, Watched> jobs_ ABSL_GUARDED_BY(mu_);
  uint64_t next_number_ ABSL_GUARDED_BY(mu_) = 1;
  int watchers_ ABSL_GUARDED_BY(mu_) = 0;
  bool reschedule_ ABSL_GUARDED_BY(mu_) = false;  // something new waits for its round

  std::thread rounds_;  // last: it uses the rest
};

}  // namespace itwin::server

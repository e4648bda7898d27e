#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <queue>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"
#include "common/clock.h"
#include "server/artifacts/blob_store.h"
#include "server/dispatch/agent_client.h"
#include "server/dispatch/errands.h"
#include "server/dispatch/reconciler.h"
#include "server/dispatch/site_board.h"
#include "server/dispatch/spool_follower.h"
#include "server/dispatch/worker_pool.h"
#include "server/store/job_store.h"

namespace itwin::server {

struct SiteOptions {
  std::string name;
  bool adopts_strays = false;  // also answers for queued jobs that name a site nobody has
  int max_waiting = 64;        // attempts handed to the site that have not started yet; the rest waits here
  absl::Duration connect_timeout = absl::Seconds(10);
  absl::Duration max_connect_backoff = absl::Seconds(5);
  absl::Duration list_interval = absl::Seconds(10);
  absl::Duration list_timeout = absl::Seconds(20);  // the agent is gone when it does not answer that long
  absl::Duration call_timeout = absl::Seconds(15);
  absl::Duration transfer_stall = absl::Seconds(60);
  absl::Duration spool_retention = absl::Hours(24 * 7);  // after the end of a job; zero: for ever
  int64_t log_limit_bytes = 0;                            // of stdout and stderr at the site; 0: the agent's default
  absl::Duration hello_interval = absl::Seconds(30);      // agent.proto: says that we are still there
  absl::Duration tell_outage_after = absl::Seconds(20);   // jobs' events tell of an outage that lasts so long
  uint64_t seed = std::random_device{}();                 // of jitter
  absl::Duration query_interval = absl::ZeroDuration();   // the site's call budget; zero: the agent's own
  SiteSettings settings;                                  // what its file says about jobs
  std::string address;                                    // where it is, for people
  std::optional<std::string> paused;                      // by an admin, from the start: the reason
};

// Makes a connection: a tunnel's stream with a client in it. Called on a worker's thread.
using ConnectFunction = std::function<absl::StatusOr<std::unique_ptr<AgentClient>>(absl::Time deadline)>;

// Called on a worker's thread after each Hello, with the connection: true when the agent was replaced by another version and
// the connection is to be made anew.
using RenewFunction = std::function<absl::StatusOr<bool>(AgentClient*, const agent::v1::HelloResponse&)>;

// The loop of one site: it alone acts there. Records events (Reconcile decides which), runs errands on its
// workers, keeps the connection. The loop never waits for the site.
// Start, RunOnce and Stop: one thread. Everything else reaches the loop by mail.
class SiteDispatcher : public CommitListener {
 public:
  struct Dependencies {
    JobStore* store;
    BlobStore* blobs;
    SiteBoard* board;
    Clock* clock;
    ConnectFunction connect;
    std::function<void()> cancel_connect = nullptr;           // ends a `connect` under way, for good
    std::function<absl::Time()> credentials_expire = nullptr;  // InfiniteFuture: never, or not known
    std::string gateway_id;
    std::string gateway_version;
    std::string gateway_place = {};  // as in HelloRequest
    std::string gateway_label = {};
    std::unique_ptr<Executor> calls;      // short: start, cancel, list, connect
    std::unique_ptr<Executor> transfers;  // long: inputs up, outputs down
    RenewFunction renew = nullptr;        // may be empty
  };

  SiteDispatcher(SiteOptions options, Dependencies dependencies);
  ~SiteDispatcher() override;

  // Loads the live jobs from the store and listens to it.
  absl::Status Open();
  // RunOnce in a thread, until Stop.
  void Start();
  // Ends the connection and all threads. Jobs go on at the site. Idempotent.
  void Stop();

  // From any thread. Paused: nothing new is placed here; what runs goes on. Holds once the call returns.
  void Pause(const std::string& reason);
  void Resume();
  // Answers also for queued jobs that name a site nobody has, from now on; looks for those that are there already.
  void AdoptStrays();
  // Forgets the connection and makes a new one at once.
  void Reconnect();

  // All that is due now; returns when it wants to be called again without mail.
  absl::Time RunOnce();

  // Store's thread: takes note.
  void OnCommit(absl::Span<const JobChange> changes) override;

 private:
  struct LiveJob;

  // -- mail: from any thread to the loop --
  void Post(std::function<void()> mail);
  bool HasMail() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return stopping_ || !mail_.empty() || !changed_.empty() || !statuses_.empty();
  }
  void TakeMail();

  // -- connection --
  struct Greeting {
    agent::v1::HelloResponse hello;
    absl::Duration clock_ahead = absl::ZeroDuration();  // of the site, against ours; zero when they agree well enough
  };
  void Connect();
  // On a worker's thread.
  absl::StatusOr<Greeting> SayHello(AgentClient* client, absl::Time deadline);
  // kDataLoss, saying what to do, when the site shows another spool than before.
  absl::Status CheckSpool(const agent::v1::HelloResponse& hello);
  void OnConnected(absl::StatusOr<Greeting> greeting, std::shared_ptr<AgentClient> client);
  void Disconnect(const absl::Status& why);
  void List();
  void OnListed(absl::Time asked, absl::StatusOr<std::vector<agent::v1::AttemptStatus>> statuses);
  void CleanSpools();
  void PublishSite();
  // Jobs that wait for a site which is away or paused are told so, and told again when it is back: once per outage.
  // Returns whether some are left for the next turn.
  bool TellOutage(absl::Time now);
  std::string OutageWords(absl::Time now);
  // By an administrator: the reason.
  std::optional<std::string> Paused();

  // -- jobs --
  absl::Status LoadLive();
  bool Mine(const JobRow& row) const;
  // Looks at the job as the store has it, or as it was told.
  void Refresh(const JobId& id);
  void Take(const JobRow& row);
  void SetRow(const JobRow& row);
  void Forget(const JobId& id);
  void Count(const JobRow& row, int sign);
  LiveJob* Find(const AttemptKey& key);
  void Wake(const JobId& id) { awake_.insert(id); }
  void WakeAt(LiveJob* job, absl::Time when);
  void OnStatus(agent::v1::AttemptStatus status, absl::Time asked);
  void KeepWaitingWords(LiveJob* job);
  // Reconciles until there is nothing to record any more.
  void Step(const JobId& id);
  bool Append(LiveJob* job, const JobEvent& event, const AttemptUpdate& update);
  bool LoadAttempts(LiveJob* job);
  void FollowAndDrain(LiveJob* job);
  JobSnapshot Snapshot(const LiveJob& job);
  void RunErrand(LiveJob* job, const Action& action);
  void FinishErrand(Errand* errand, LiveJob* job, const absl::Status& status);

  // -- placement --
  void Place();
  // What placement needs to know; nothing when it cannot be read now.
  std::optional<PlacementRequest> RequestOf(LiveJob* job);

  // Constant after construction.
  const SiteOptions options_;
  JobStore* const store_;
  BlobStore* const blobs_;
  SiteBoard* const board_;
  Clock* const clock_;
  const ConnectFunction connect_;
  const std::function<void()> cancel_connect_;
  const std::function<absl::Time()> credentials_expire_;
  const std::string gateway_id_;
  const std::string gateway_version_;
  const std::string gateway_place_;
  const std::string gateway_label_;
  const RenewFunction renew_;
  SendingInputs sending_;  // own synchronisation

  // The loop's.
  struct Wish {  // of a job's spec and model, which never change
    bool train = false;
    std::string image;
    v1::RetryPolicy retry;
    v1::Resources resources;
    std::vector<std::string> operators;
  };
  struct LiveJob {
    JobRow row;
    std::optional<Wish> wish;  // nothing: not read yet
    bool attempts_read = false;
    int64_t max_step = 0;
    int64_t max_step_before = 0;
    bool older_checkpoint = false;
    std::optional<agent::v1::AttemptStatus> seen;
    absl::Time at_site_since = absl::InfiniteFuture();
    int absences = 0;
    absl::Time first_absence = absl::InfiniteFuture();
    absl::Time last_absence = absl::InfinitePast();
    bool barred = false;
    bool followed = false;
    bool drained = false;
    int64_t noted_lines = 0;
    bool noted_starts = false;
    int64_t told_outage = 0;  // number of the outage that its events tell of; 0: none
    std::string told_waiting;  // the scheduler's reason and estimate that its row shows
    int64_t told_start_us = 0;
    std::optional<Collected> collected;
    std::optional<v1::OutputFile> trace;  // the newest that was fetched
    Errand staging, start, cancel, collect, tracing;
    absl::Time wake_at = absl::InfiniteFuture();
    std::string queue_owner;  // where it stands in queue_, if it does
    bool queued = false;
  };
  absl::flat_hash_map<JobId, std::unique_ptr<LiveJob>> jobs_;
  absl::flat_hash_set<JobId> awake_;
  using Timer = std::pair<absl::Time, JobId>;
  std::priority_queue<Timer, std::vector<Timer>, std::greater<Timer>> timers_;
  std::map<std::string, std::set<std::pair<absl::Time, JobId>>> queue_;  // by owner, oldest first
  bool place_ = true;
  std::map<std::string, int> placed_by_owner_;
  int placed_ = 0;
  int waiting_ = 0;
  int ranks_placed_ = 0;
  int ranks_running_ = 0;
  std::mt19937_64 random_;

  std::shared_ptr<AgentClient> client_;
  std::unique_ptr<SpoolFollower> follower_;
  int64_t generation_ = 0;  // of the connection
  bool connecting_ = false;
  bool listing_ = false;
  int connect_failures_ = 0;
  absl::Time next_connect_ = absl::InfinitePast();
  absl::Time next_list_ = absl::InfinitePast();
  absl::Time next_clean_ = absl::InfinitePast();
  absl::Time next_place_ = absl::InfiniteFuture();
  absl::Time connected_at_ = absl::InfinitePast();
  absl::Time next_hello_ = absl::InfinitePast();
  agent::v1::HelloResponse hello_;
  absl::Duration clock_ahead_ = absl::ZeroDuration();
  int64_t outage_ = 0;       // number of the present outage; 0: none
  int64_t outages_ = 0;
  absl::Time outage_since_ = absl::InfinitePast();
  bool tell_ = false;        // some jobs may not have been told yet of it, or of its end
  bool known_ = false;
  v1::Site site_;
  bool adopts_strays_ = false;

  // Guarded by mu_.
  absl::Mutex mu_;
  std::optional<std::string> paused_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::function<void()>> mail_ ABSL_GUARDED_BY(mu_);
  // The newest that commits told; null: to be read.
  absl::flat_hash_map<JobId, std::shared_ptr<const JobRow>> changed_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<std::string, agent::v1::AttemptStatus> statuses_ ABSL_GUARDED_BY(mu_);  // newest of each
  std::shared_ptr<AgentClient> open_client_ ABSL_GUARDED_BY(mu_);  // the newest, so that Stop can end its calls

  const std::unique_ptr<Executor> calls_;
  const std::unique_ptr<Executor> transfers_;
  std::thread loop_;
};

}  // namespace itwin::server

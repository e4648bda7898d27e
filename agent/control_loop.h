#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "agent/follow_loop.h"
#include "agent/scheduler/launch.h"
#include "agent/scheduler/scheduler.h"
#include "agent/spool/input_store.h"
#include "agent/spool/mailbox.h"
#include "agent/spool/work_pool.h"
#include "itwin/agent/v1/agent.pb.h"

namespace itwin::agent {

// The loop that acts: it alone creates and removes attempts and has them submitted, asked about and cancelled. What it
// does is recorded in the spool first, and repeated after a restart.
//
// Work that may take its time (files, and calls of a scheduler without a change_fd) runs on a pool; the loop only decides
// what is to be done next, so it always answers. For each attempt at most one start or cancel is under way. A scheduler
// with a change_fd is quick: its work is done in the loop itself.
class ControlLoop {
 public:
  struct Options {
    std::string root = {};
    std::string agent_program = {};  // for the scripts
    LaunchOptions launch = {};
    // Before each step that changes something: an error (another agent has taken over) stops it.
    std::function<absl::Status()> may_act = [] { return absl::OkStatus(); };
  };
  using Done = std::function<void(absl::Status)>;  // in the loop's thread

  // None is owned; all outlive this.
  ControlLoop(Options options, Scheduler* scheduler, InputStore* inputs, FollowLoop* follow);
  ~ControlLoop();  // Stop()

  // Takes up what the spools hold: half-made attempts are removed, interrupted submits and cancels are finished.
  absl::Status Recover();
  void Start();
  // Until the scheduler was asked for the first time, or has not answered in time: so that what waits there is not told to
  // be unknown at each start of the agent. From another thread.
  void AwaitFirstLook(absl::Duration limit) { looked_.WaitForNotificationWithTimeout(limit); }
  // Idempotent; attempts go on. Commands of the scheduler that are under way are waited for: they end by themselves.
  void Stop();

  // Thread-safe; runs `task` in the loop's thread. False after Stop().
  bool Post(std::function<void()> task) { return mailbox_.Post(std::move(task)); }

  // The rest: the loop's thread only.

  // As the RPC of that name; before `done` the follow loop has been told, so that a status asked of it is fresh.
  void StartAttempt(const v1::StartAttemptRequest& request, Done done);
  void CancelAttempt(const AttemptKey& key, const std::string& reason, Done done);
  // Takes the attempt out of the spool; `trash` is what the caller has to delete (it may be large), empty for nothing.
  // kFailedPrecondition: it has not ended.
  absl::StatusOr<std::string> RemoveAttempt(const AttemptKey& key);
  // The attempt is over: it is not asked about any more.
  void Ended(const AttemptKey& key);
  // Something has happened that the scheduler knows more about: it is asked soon.
  void LookSoon();
  // The site's call budget: least time between two looks at its queue.
  void SetQueryInterval(absl::Duration interval) { least_interval_ = interval; }

  SchedulerDescription Describe() { return scheduler_->Describe(); }
  // `done` once the site is known to the scheduler, or cannot be.
  void LearnSite(Done done);
  bool busy() const { return !live_.empty(); }

 private:
  struct Live {  // an attempt not known to have ended
    bool working = false;             // a start or a cancel is under way
    std::vector<Done> starts = {};    // callers who wait for the start under way
    bool cancel = false;              // wanted, as soon as nothing else is under way
    bool ended = false;               // while something was under way
    absl::Time next_try = absl::InfinitePast();  // of a submission or a cancel that did not succeed
    int failures = 0;
    SchedulerReport report = {};
  };

  void Run();
  bool quick() const { return scheduler_->change_fd() >= 0; }
  // Runs `work` in the pool (none: here), then `then` in the loop.
  void Aside(WorkPool* pool, std::function<absl::Status()> work, Done then);
  absl::Status Begin(const v1::StartAttemptRequest& request);
  absl::Status CheckRequest(const AttemptDirectory& directory, const v1::StartAttemptRequest& request);
  absl::Status Prepare(const AttemptDirectory& directory, const v1::StartAttemptRequest& request);
  absl::Status Submit(const AttemptDirectory& directory, const v1::StartAttemptRequest& request);
  absl::Status Resume(const AttemptDirectory& directory);
  void OnStarted(const AttemptKey& key, const absl::Status& status);
  void CancelNow(const AttemptKey& key, Done done);
  void QueryLive();
  void OnReports(const absl::StatusOr<std::map<AttemptKey, SchedulerReport>>& reports);
  void Tend(const AttemptKey& key, const SchedulerReport& report);
  void Tell(const AttemptKey& key, const SchedulerReport& report);
  void Drop(const AttemptKey& key);
  AttemptDirectory DirectoryOf(const AttemptKey& key) const { return AttemptDirectory(options_.root, key); }

  const Options options_;
  Scheduler* const scheduler_;
  InputStore* const inputs_;
  FollowLoop* const follow_;
  Mailbox mailbox_;
  // None of them for a quick scheduler. Apart, so that what waits for the scheduler holds up nothing else.
  std::unique_ptr<WorkPool> acting_;  // starts, and cancels at the scheduler
  std::unique_ptr<WorkPool> asking_;  // one thread for looks
  std::unique_ptr<WorkPool> files_;   // what only touches the spool
  absl::Notification looked_;
  std::thread thread_;
  bool stopping_ = false;
  std::map<AttemptKey, Live> live_;
  absl::Time next_query_ = absl::InfinitePast();
  absl::Time last_query_ = absl::InfinitePast();
  absl::Duration interval_;
  absl::Duration least_interval_ = absl::ZeroDuration();
  bool querying_ = false;
};

}  // namespace itwin::agent

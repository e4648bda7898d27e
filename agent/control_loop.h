#pragma once

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/follow_loop.h"
#include "agent/scheduler/launch.h"
#include "agent/scheduler/scheduler.h"
#include "agent/spool/input_store.h"
#include "agent/spool/mailbox.h"
#include "itwin/agent/v1/agent.pb.h"

namespace itwin::agent {

// The loop that acts: it alone creates and removes attempts and talks to the scheduler, which may take its time, so
// it is not the loop that streams. What it does is recorded in the spool first, and repeated after a restart.
class ControlLoop {
 public:
  struct Options {
    std::string root = {};
    std::string agent_program = {};  // for the scripts
    LaunchOptions launch = {};
    // For a scheduler that has to be asked: between two looks at the queue.
    absl::Duration query_interval = absl::Seconds(5);
  };

  // None is owned; all outlive this.
  ControlLoop(Options options, Scheduler* scheduler, InputStore* inputs, FollowLoop* follow);
  ~ControlLoop();  // Stop()

  // Takes up what the spools hold: half-made attempts are removed, interrupted submits and cancels are finished.
  absl::Status Recover();
  void Start();
  void Stop();  // idempotent; attempts go on

  // Thread-safe; runs `task` in the loop's thread. False after Stop().
  bool Post(std::function<void()> task) { return mailbox_.Post(std::move(task)); }

  // The rest: the loop's thread only.

  // As the RPC of that name; on return the follow loop has been told, so that a status asked of it is fresh.
  absl::Status StartAttempt(const v1::StartAttemptRequest& request);
  absl::Status CancelAttempt(const AttemptKey& key, const std::string& reason);
  // Takes the attempt out of the spool; `trash` is what the caller has to delete (it may be large), empty for nothing.
  // kFailedPrecondition: it has not ended.
  absl::StatusOr<std::string> RemoveAttempt(const AttemptKey& key);
  // The attempt is over: it is not asked about any more.
  void Ended(const AttemptKey& key) { live_.erase(key); }

  SchedulerDescription Describe() { return scheduler_->Describe(); }
  bool busy() const { return !live_.empty(); }

 private:
  void Run();
  absl::Status CheckRequest(const AttemptDirectory& directory, const v1::StartAttemptRequest& request);
  absl::Status Prepare(const AttemptDirectory& directory, const v1::StartAttemptRequest& request);
  absl::Status Submit(const AttemptDirectory& directory, const v1::StartAttemptRequest& request);
  void Resume(const AttemptDirectory& directory);
  void QueryLive();
  AttemptDirectory DirectoryOf(const AttemptKey& key) const { return AttemptDirectory(options_.root, key); }

  const Options options_;
  Scheduler* const scheduler_;
  InputStore* const inputs_;
  FollowLoop* const follow_;
  Mailbox mailbox_;
  std::thread thread_;
  bool stopping_ = false;
  std::set<AttemptKey> live_;  // not known to have ended
  absl::Time next_query_ = absl::InfinitePast();
};

}  // namespace itwin::agent

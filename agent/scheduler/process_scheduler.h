#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "agent/scheduler/process_tree.h"
#include "agent/scheduler/scheduler.h"
#include "common/clock.h"
#include "common/files.h"
#include "common/subprocess.h"

namespace itwin::agent {

// The embedded default: runs attempts on this machine, first come first served, with at most `slots` ranks at once.
//
// What it must not forget lies in files: `<root>/queue/<time>-<key>` from Submit until the attempt is over, and the
// attempt's own lease. So a restart, after whatever line, rebuilds it: no lease: still to be started; lease with a
// living owner: adopted; lease with a dead one: over. Starting twice by accident is harmless: the lease is given once.
// The scripts are processes of their own session and outlive us.
//
// Work is done inside Query (the owner calls it when change_fd is readable).
class ProcessScheduler : public Scheduler {
 public:
  struct Options {
    std::string root = {};
    int slots = 1;
    // A script that was asked to end has this long before all its processes are killed. More than the script's own
    // grace, so that normally the script does it and leaves a record.
    absl::Duration kill_after = absl::Seconds(20);
  };

  // Reads what is there. Nothing is started before the first Query.
  static absl::StatusOr<std::unique_ptr<ProcessScheduler>> Create(const Options& options, Clock* clock);

  SchedulerDescription Describe() override;
  absl::Status Submit(const Submission& submission) override;
  absl::StatusOr<std::map<AttemptKey, SchedulerReport>> Query(const std::vector<AttemptKey>& keys) override;
  absl::Status Cancel(const AttemptKey& key) override;
  int change_fd() const override { return epoll_.get(); }
  void Diagnose(const v1::DiagnoseRequest& request, const std::function<bool(const v1::CheckResult&)>& emit) override;

 private:
  struct Entry {
    AttemptKey key;
    std::string id;          // its time in the queue's file name
    std::string queue_path;
    int slots = 1;
    bool running = false;
    std::optional<Subprocess> child;  // when it is our child
    ProcessIdentity process;
    FileDescriptor pidfd;
    absl::Time kill_time = absl::InfiniteFuture();
    absl::Time retry_time = absl::InfinitePast();  // pending: the system had no room for a process
    std::string note;
  };

  ProcessScheduler(const Options& options, Clock* clock) : options_(options), clock_(clock) {}
  absl::Status Recover();
  void Advance();
  void Watch(Entry& entry);
  bool Ended(Entry& entry);
  void Finalize(Entry& entry);
  void StartPending();
  void Start(Entry& entry);
  void ArmTimer();
  int SlotsInUse() const;
  AttemptDirectory DirectoryOf(const AttemptKey& key) const { return AttemptDirectory(options_.root, key); }
  SchedulerReport ReportOf(const Entry& entry, int ahead) const;

  const Options options_;
  Clock* const clock_;
  FileDescriptor epoll_;
  FileDescriptor timer_;
  bool pidfds_work_ = true;
  std::vector<std::unique_ptr<Entry>> entries_;  // in queue order
  int64_t last_id_ = 0;
};

}  // namespace itwin::agent

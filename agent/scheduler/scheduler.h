#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "agent/spool/attempt_directory.h"
#include "common/ids.h"
#include "itwin/agent/v1/agent.pb.h"

namespace itwin::agent {

enum class SchedulerState {
  kAbsent,     // looked, and there is nothing under this key
  kPending,
  kHeld,
  kRunning,    // its script runs; the spool says when the program began
  kSuspended,
  kEnded,      // its processes are gone
  kUnknown,    // cannot say now
};

struct SchedulerReport {
  SchedulerState state = SchedulerState::kUnknown;
  std::string id = {};      // the scheduler's own
  std::string reason = {};  // in its words: why it waits, how it ended
  v1::EndCause cause = v1::END_CAUSE_UNSPECIFIED;  // kEnded, where the scheduler knows better than the spool
  std::string word = {};    // its own word for the state: "COMPLETING"
  std::vector<std::string> nodes = {};
  std::vector<std::string> bad_nodes = {};  // of those, the ones that failed
  std::optional<absl::Time> expected_start = {};
  friend bool operator==(const SchedulerReport&, const SchedulerReport&) = default;
};

// What the scheduler has to know to run an attempt; the rest is in the script.
struct Submission {
  AttemptDirectory directory;
  int nodes = 1;
  int ranks_per_node = 1;
  int cpus_per_rank = 0;  // 0: share
  int gpus_per_node = 0;
  int64_t memory_mib_per_node = 0;  // 0: the site's default
  absl::Duration time = absl::InfiniteDuration();
  v1::SlurmSettings slurm = {};
};

struct SchedulerDescription {
  std::string kind = {};       // "process", "slurm"
  int slots = 0;          // ranks that may run at once; 0: not ours to say
  int slots_in_use = 0;
  std::optional<v1::SlurmFacts> slurm = {};  // once they are known
  // For one that has to be asked: how far apart looks may be when nothing changes.
  absl::Duration longest_interval = absl::Seconds(60);
  double calls_per_minute = 0;  // of the scheduler's commands, over the last minutes
};

// Where attempts run. The attempt's key is the identity; everything may be asked again, also after a restart.
// Nothing here touches the spool's journal. A scheduler with a change_fd is quick and used by one thread. One without
// may take minutes for each call: Submit, Cancel and Query are then called from several threads, Query from one at a time
// and Submit and Cancel from one at a time for each key; Describe never waits.
class Scheduler {
 public:
  virtual ~Scheduler() = default;

  virtual SchedulerDescription Describe() = 0;

  // Reads what Describe tells of the site, if that is not known yet; may take its time, and may fail.
  virtual void LearnSite() {}

  // Makes directory.script_path() run once. What is there under the key already is left alone: OK.
  // kFailedPrecondition: refused, in the scheduler's words; nothing is there. kResourceExhausted: no space to record
  // it; nothing is there. kUnavailable, kDeadlineExceeded: outcome not known.
  virtual absl::Status Submit(const Submission& submission) = 0;

  // One report for each key. An error means that nothing could be asked; it says nothing about the attempts.
  virtual absl::StatusOr<std::map<AttemptKey, SchedulerReport>> Query(const std::vector<AttemptKey>& keys) = 0;

  // A request; Query tells what comes of it. The caller has put the attempt's `cancelled` file in place before, so
  // that a script which is just starting sees it. Unknown or ended: OK.
  virtual absl::Status Cancel(const AttemptKey& key) = 0;

  // The launcher line of an attempt whose request names none; "" for the agent's own. May ask the site, as Submit may.
  virtual absl::StatusOr<std::string> DefaultLauncher() { return std::string(); }

  // What is known of an attempt without asking anybody; kUnknown when that is nothing.
  virtual SchedulerReport Recall(const AttemptKey& key) { return {}; }

  // The attempt is over and will not be asked about: what is kept in memory for it may go.
  virtual void Forget(const AttemptKey& key) {}

  // Becomes readable when Query has something new to tell; -1: it has to be asked from time to time.
  virtual int change_fd() const = 0;

  // Looks at the site for `itwin site doctor`, check by check; ends early when `emit` returns false.
  virtual void Diagnose(const v1::DiagnoseRequest& request, const std::function<bool(const v1::CheckResult&)>& emit) = 0;
};

}  // namespace itwin::agent

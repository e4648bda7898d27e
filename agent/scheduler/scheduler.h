#pragma once

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
};

struct SchedulerDescription {
  std::string kind = {};       // "process", "slurm"
  int slots = 0;          // ranks that may run at once; 0: not ours to say
  int slots_in_use = 0;
};

// Where attempts run. The attempt's key is the identity; everything may be asked again, also after a restart.
// Used by one thread. Calls may block (not for long: a minute or two); nothing here touches the spool's journal.
class Scheduler {
 public:
  virtual ~Scheduler() = default;

  virtual SchedulerDescription Describe() = 0;

  // Makes directory.script_path() run once. What is there under the key already is left alone: OK.
  // kFailedPrecondition: refused, in the scheduler's words; nothing is there. kResourceExhausted: no space to record
  // it; nothing is there. kUnavailable, kDeadlineExceeded: outcome not known.
  virtual absl::Status Submit(const Submission& submission) = 0;

  // One report for each key. An error means that nothing could be asked; it says nothing about the attempts.
  virtual absl::StatusOr<std::map<AttemptKey, SchedulerReport>> Query(const std::vector<AttemptKey>& keys) = 0;

  // A request; Query tells what comes of it. The caller has put the attempt's `cancelled` file in place before, so
  // that a script which is just starting sees it. Unknown or ended: OK.
  virtual absl::Status Cancel(const AttemptKey& key) = 0;

  // Becomes readable when Query has something new to tell; -1: it has to be asked from time to time.
  virtual int change_fd() const = 0;
};

}  // namespace itwin::agent

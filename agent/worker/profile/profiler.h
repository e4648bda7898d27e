// Where the time of the training goes: always on, some ten clock readings per step. An *activity* is
// what the training thread does at a moment; every moment of a step belongs to exactly one.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "agent/worker/dist/collective_log.h"
#include "agent/worker/dist/communicator.h"
#include "agent/worker/profile/trace.h"
#include "agent/worker/report/metric_sink.h"

namespace itwin::worker {

// kCommunication is what is exposed: waiting for other ranks while there is nothing else to do.
enum class Activity {
  kDataWait,
  kForward,
  kBackward,
  kCommunication,
  kOptimizer,
  kCheckpoint,
  kEvaluation,
  kOther
};
inline constexpr size_t kActivities = 8;
const char* Name(Activity activity);  // "data_wait"

// Means and percentiles of the steps of an epoch or of the whole run.
struct StepSummary {
  int64_t steps = 0, samples = 0;
  double seconds = 0;                       // in steps
  std::array<double, kActivities> seconds_in{};   // seconds; also those outside of steps
  double p50 = 0, p90 = 0, p99 = 0, longest = 0;  // seconds of a step
};

// Used by the training thread.
class Profiler {
 public:
  // `exchanges`: of the communicators that a step's gradients and activations travel over. Must outlive
  // this.
  explicit Profiler(std::vector<const CollectiveLog*> exchanges = {}) : exchanges_(std::move(exchanges)) {}

  // From now on the thread is at this. Returns the one before, to go back to.
  Activity Enter(Activity activity);
  // Some of the time that was counted as `from` was `to`: where a wait is measured by somebody else.
  void Move(Activity from, Activity to, double seconds);
  void BeginStep();
  void EndStep(int64_t samples);

  // Of the epoch so far; then a new one begins.
  StepSummary TakeEpoch();
  const StepSummary& whole_run() const { return run_; }

  // The series of an epoch (docs/worker-contract.md), the same on every rank: activities and steps are
  // this rank's, memory the largest of all ranks. Every rank calls it.
  MetricSink::Values EpochValues(const StepSummary& epoch, Communicator& control);

  // Activities are also written here while it is active.
  Trace& trace() { return trace_; }

 private:
  const std::vector<const CollectiveLog*> exchanges_;
  Trace trace_;
  Activity activity_ = Activity::kOther;
  double since_ = 0;  // in the activity; 0: not begun
  double step_start_ = 0;
  StepSummary epoch_, run_;
  std::vector<float> durations_, run_durations_;
  double exchange_seconds_ = 0, exchange_bytes_ = 0;  // up to the epoch before
};

// Resident memory of this process now and at its peak.
struct ProcessMemory {
  double bytes = 0, peak_bytes = 0;
};
ProcessMemory ReadProcessMemory();

}  // namespace itwin::worker

#include "agent/worker/profile/profiler.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

namespace itwin::worker {
namespace {

constexpr size_t kMaxDurations = 1 << 20;  // beyond, percentiles are of the first ones

double Percentile(std::vector<float>& sorted, double share) {
  if (sorted.empty()) return 0;
  const double at = share * static_cast<double>(sorted.size() - 1);
  return sorted[static_cast<size_t>(std::llround(at))];
}

void SetPercentiles(std::vector<float> durations, StepSummary* summary) {
  std::sort(durations.begin(), durations.end());
  summary->p50 = Percentile(durations, 0.5);
  summary->p90 = Percentile(durations, 0.9);
  summary->p99 = Percentile(durations, 0.99);
  summary->longest = Percentile(durations, 1);
}

}  // namespace

const char* Name(Activity activity) {
  switch (activity) {
    case Activity::kDataWait:
      return "data_wait";
    case Activity::kForward:
      return "forward";
    case Activity::kBackward:
      return "backward";
    case Activity::kCommunication:
      return "comm_wait";
    case Activity::kOptimizer:
      return "optimizer";
    case Activity::kCheckpoint:
      return "checkpoint";
    case Activity::kEvaluation:
      return "evaluation";
    case Activity::kOther:
      return "other";
  }
  return "";
}

Activity Profiler::Enter(Activity activity) {
  const double now = SteadySeconds();
  if (since_ > 0) {
    epoch_.seconds_in[static_cast<size_t>(activity_)] += now - since_;
    if (trace_.active() && activity_ != Activity::kOther) trace_.Add(Name(activity_), since_, now);
  }
  since_ = now;
  return std::exchange(activity_, activity);
}

void Profiler::Move(Activity from, Activity to, double seconds) {
  epoch_.seconds_in[static_cast<size_t>(from)] -= seconds;
  epoch_.seconds_in[static_cast<size_t>(to)] += seconds;
}

void Profiler::BeginStep() {
  Enter(Activity::kDataWait);
  step_start_ = since_;
}

void Profiler::EndStep(int64_t samples) {
  Enter(Activity::kOther);
  const double seconds = since_ - step_start_;
  ++epoch_.steps;
  epoch_.samples += samples;
  epoch_.seconds += seconds;
  if (durations_.size() < kMaxDurations) durations_.push_back(static_cast<float>(seconds));
  if (trace_.active()) trace_.EndStep(step_start_, since_);
}

StepSummary Profiler::TakeEpoch() {
  Enter(activity_);  // what is under way counts up to now
  StepSummary epoch = std::exchange(epoch_, {});
  SetPercentiles(durations_, &epoch);
  run_.steps += epoch.steps;
  run_.samples += epoch.samples;
  run_.seconds += epoch.seconds;
  for (size_t p = 0; p < kActivities; ++p) run_.seconds_in[p] += epoch.seconds_in[p];
  const size_t room = kMaxDurations - std::min(kMaxDurations, run_durations_.size());
  run_durations_.insert(run_durations_.end(), durations_.begin(),
                        durations_.begin() + static_cast<std::ptrdiff_t>(
                                                 std::min(room, durations_.size())));
  SetPercentiles(run_durations_, &run_);
  durations_.clear();
  return epoch;
}

MetricSink::Values Profiler::EpochValues(const StepSummary& epoch, Communicator& control) {
  const ProcessMemory memory = ReadProcessMemory();
  double highest[] = {memory.bytes, memory.peak_bytes};
  control.AllReduce(BufferOf(std::span(highest)), Reduction::kMax)->Wait();
  MetricSink::Values values;
  for (const Activity activity : {Activity::kForward, Activity::kBackward, Activity::kOptimizer}) {
    values.emplace_back(std::string("perf/") + Name(activity) + "_s",
                        epoch.seconds_in[static_cast<size_t>(activity)]);
  }
  values.emplace_back("perf/step_p50_s", epoch.p50);
  values.emplace_back("perf/step_p90_s", epoch.p90);
  values.emplace_back("perf/step_p99_s", epoch.p99);
  values.emplace_back("perf/step_longest_s", epoch.longest);
  values.emplace_back("perf/rss_bytes", highest[0]);
  values.emplace_back("perf/rss_peak_bytes", highest[1]);
  double seconds = 0, bytes = 0;
  for (const CollectiveLog* log : exchanges_) {
    const CollectiveLog::Counts counts = log->counts();
    seconds += counts.seconds;
    bytes += static_cast<double>(counts.bytes);
  }
  if (seconds > exchange_seconds_ && bytes > exchange_bytes_) {
    values.emplace_back("perf/comm_bytes_per_second", (bytes - exchange_bytes_) / (seconds - exchange_seconds_));
  }
  exchange_seconds_ = seconds;
  exchange_bytes_ = bytes;
  return values;
}

ProcessMemory ReadProcessMemory() {
  ProcessMemory memory;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  memory.peak_bytes = static_cast<double>(usage.ru_maxrss) * 1024;
  if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
    long long total = 0, resident = 0;
    if (std::fscanf(file, "%lld %lld", &total, &resident) == 2) {
      memory.bytes = static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE));
    }
    std::fclose(file);
  }
  return memory;
}

}  // namespace itwin::worker

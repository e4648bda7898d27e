#include "agent/worker/profile/trace_session.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <utility>

#include "agent/worker/checkpoint/durable_file.h"

namespace itwin::worker {
namespace {

constexpr double kLookSeconds = 0.25;  // between looks for the file
constexpr int64_t kDefaultSteps = 20;
constexpr int64_t kMaxSteps = 10'000;

// One of letters, digits, '-', '_' and '.', in this directory and not hidden.
bool IsFileName(const std::string& name) {
  return !name.empty() && name.front() != '.' && std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.';
  });
}

}  // namespace

int64_t TraceSession::Asked() {
  if (control_.rank() != 0 || running_) return 0;
  if (asked_ > 0) return asked_;
  const double now = SteadySeconds();
  if (now < next_look_) return 0;
  next_look_ = now + kLookSeconds;
  std::error_code error;
  if (!std::filesystem::exists(options_.request, error)) return 0;
  int64_t steps = 0;
  std::string name;
  std::ifstream(options_.request) >> steps >> name;
  std::filesystem::remove(options_.request, error);
  if (!IsFileName(name)) name.clear();
  if (!name.empty() && name == taken_name_) return 0;
  name_ = taken_name_ = name;
  asked_ = steps > 0 ? std::min(steps, kMaxSteps) : kDefaultSteps;
  return asked_;
}

void TraceSession::Start(int64_t steps) {
  if (running_) return;  // the spec's own came in between: the one asked for comes after it
  asked_ = 0;
  running_ = true;
  for (CollectiveLog* log : options_.logs) log->Record(true);
  profiler_.trace().Start(steps);
}

void TraceSession::BeforeStep() {
  if (++steps_begun_ == options_.at_step && options_.steps > 0 && !running_) {
    of_spec_ = true;
    Start(options_.steps);
  }
}

void TraceSession::AfterStep(int64_t step) {
  if (running_ && !profiler_.trace().active()) Write(step);
}

void TraceSession::Finish(int64_t step) {
  if (running_) Write(step);
}

void TraceSession::Write(int64_t step) {
  running_ = false;
  profiler_.trace().Start(0);
  std::vector<TraceLane> lanes = {{"training", profiler_.trace().Take()}};
  for (CollectiveLog* log : options_.logs) {
    log->Record(false);
    lanes.push_back({log->name(), log->TakeEvents()});
  }
  const double offset = ClockOffset(control_);
  const std::string trace = GatherTrace(lanes, options_.host, offset, control_);
  if (control_.rank() != 0) return;
  std::string name = std::exchange(of_spec_, false) ? "trace.json" : std::exchange(name_, "");
  if (name.empty()) name = "trace-step-" + std::to_string(step) + ".json";
  WriteFileDurably(options_.outputs / name, trace);
}

}  // namespace itwin::worker

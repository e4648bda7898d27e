#include "agent/worker/dist/collective_log.h"

#include <chrono>
#include <cstdio>
#include <utility>

namespace itwin::worker {
namespace {

constexpr size_t kMaxEvents = 200'000;  // of one trace

}  // namespace

double SteadySeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void CollectiveLog::Begin(const char* operation, int64_t bytes, Kind kind) {
  const double now = SteadySeconds();
  std::lock_guard lock(mutex_);
  if (kind == Kind::kCollective) ++counts_.started;
  current_kind_ = kind;
  current_ = {operation, bytes, now, now};
}

void CollectiveLog::End() {
  const double now = SteadySeconds();
  std::lock_guard lock(mutex_);
  if (current_kind_ == Kind::kCollective) ++counts_.finished;
  counts_.bytes += current_.bytes;
  counts_.seconds += now - current_.start;
  current_.end = now;
  if (recording_ && events_.size() < kMaxEvents) events_.push_back(current_);
  current_ = {};
}

void CollectiveLog::Launched() {
  std::lock_guard lock(mutex_);
  ++counts_.started;
  ++counts_.finished;
}

CollectiveLog::Counts CollectiveLog::counts() const {
  std::lock_guard lock(mutex_);
  return counts_;
}

std::string CollectiveLog::Describe() const {
  const double now = SteadySeconds();
  std::lock_guard lock(mutex_);
  char text[200];
  if (*current_.operation == '\0') {
    std::snprintf(text, sizeof(text), "nothing under way, %lld done",
                  static_cast<long long>(counts_.finished));
  } else if (current_kind_ == Kind::kMessage) {
    std::snprintf(text, sizeof(text), "in %s of %.1f kB for %.1f s", current_.operation,
                  static_cast<double>(current_.bytes) / 1000, now - current_.start);
  } else {
    std::snprintf(text, sizeof(text), "in %s number %lld of %.1f kB for %.1f s", current_.operation,
                  static_cast<long long>(counts_.started),
                  static_cast<double>(current_.bytes) / 1000, now - current_.start);
  }
  return name_ + ": " + text;
}

bool CollectiveLog::under_way() const {
  std::lock_guard lock(mutex_);
  return *current_.operation != '\0';
}

void CollectiveLog::Record(bool on) {
  std::lock_guard lock(mutex_);
  recording_ = on;
  if (on) events_.clear();
}

std::vector<CollectiveLog::Event> CollectiveLog::TakeEvents() {
  std::lock_guard lock(mutex_);
  return std::exchange(events_, {});
}

}  // namespace itwin::worker

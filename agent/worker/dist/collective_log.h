// What one communicator is doing: for the figures of an epoch, for traces, and for saying where a
// job hangs. Written by the thread that runs the collectives, read by any.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace itwin::worker {

class CollectiveLog {
 public:
  explicit CollectiveLog(std::string name) : name_(std::move(name)) {}

  // Around each operation that moves bytes, by the thread that blocks in it. `operation` is a
  // literal. A collective is every rank's and counts; a message is two ranks' and does not.
  enum class Kind { kCollective, kMessage };
  void Begin(const char* operation, int64_t bytes, Kind kind = Kind::kCollective);
  void End();
  // An operation that a device does on its own: it counts, its time is not known.
  void Launched();

  struct Counts {
    int64_t started = 0, finished = 0;
    int64_t bytes = 0;    // of the finished ones and of messages, as the caller gave them
    double seconds = 0;   // in those
  };
  Counts counts() const;

  // "gradients: in all-reduce number 12 of 25.0 MB for 61.2 s", "control: nothing under way, 3 done"
  std::string Describe() const;
  // Whether a thread is blocked in an operation.
  bool under_way() const;

  // While recording, operations are kept, up to a bound.
  struct Event {
    const char* operation = "";
    int64_t bytes = 0;
    double start = 0, end = 0;  // steady clock, seconds
  };
  void Record(bool on);
  std::vector<Event> TakeEvents();

  const std::string& name() const { return name_; }

 private:
  const std::string name_;
  mutable std::mutex mutex_;  // guards what follows; free but when somebody asks
  Counts counts_;
  Event current_;  // operation "": none
  Kind current_kind_ = Kind::kCollective;
  bool recording_ = false;
  std::vector<Event> events_;
};

// The time that all of the log's times are of.
double SteadySeconds();

}  // namespace itwin::worker

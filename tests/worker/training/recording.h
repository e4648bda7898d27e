// A RecordedWork of the CPU: keeps the work when it is recorded, without running it (as a GPU does), and
// runs it at each replay.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <utility>

#include "agent/worker/device/recorded_work.h"

namespace itwin::worker::testing {

class Recording : public RecordedWork {
 public:
  struct Log {
    int recorded = 0, replayed = 0;
    std::string refuse;               // why it cannot be recorded, which the rehearsal shows halfway ...
    std::string break_down;           // ... or only the recording
    bool run_when_recording = false;  // for its errors
  };
  explicit Recording(Log& log) : log_(log) {}
  void Rehearse(const std::function<void()>& work) override {
    work();
    if (!log_.refuse.empty()) throw std::runtime_error(log_.refuse);
  }
  void Record(const std::function<void()>& work) override {
    if (!log_.break_down.empty()) throw std::runtime_error(log_.break_down);
    if (log_.run_when_recording) work();
    ++log_.recorded;
    work_ = work;
  }
  void Replay() override {
    ++log_.replayed;
    work_();
  }

 private:
  Log& log_;
  std::function<void()> work_;
};

}  // namespace itwin::worker::testing

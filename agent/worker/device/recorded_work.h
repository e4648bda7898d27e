// Work on a device that is recorded once and then done again without the host's part in it: a CUDA
// graph. It reads and writes the same memory each time.
#pragma once

#include <functional>

namespace itwin::worker {

class RecordedWork {
 public:
  virtual ~RecordedWork() = default;
  // Runs `work` as it is. Throws where it is about to do what cannot be recorded (wait for the device); the
  // device goes on as if nothing had been.
  virtual void Rehearse(const std::function<void()>& work) = 0;
  // Runs `work` for its launches alone: nothing is computed yet. Throws when something in it cannot be
  // recorded; the device cannot be relied upon then.
  virtual void Record(const std::function<void()>& work) = 0;
  virtual void Replay() = 0;
};

}  // namespace itwin::worker

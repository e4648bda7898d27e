// Work on a device that is recorded once and then done again without the host's part in it: a CUDA
// graph. It reads and writes the same memory each time.
#pragma once

#include <functional>

namespace itwin::worker {

class RecordedWork {
 public:
  virtual ~RecordedWork() = default;
  // Runs `work` for its launches alone: nothing is computed yet. Throws when something in it cannot be
  // recorded; this object is then of no more use, and the device's state is as before.
  virtual void Record(const std::function<void()>& work) = 0;
  virtual void Replay() = 0;
};

}  // namespace itwin::worker

#pragma once

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace itwin {

// Time as an argument: everything that waits or dates things takes a Clock, so that tests own the time.
// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() = 0;
  // Waits until `condition` holds or the clock reaches `deadline`; `mu` is held on entry and exit.
  // Returns whether the condition holds.
  virtual bool AwaitUntil(absl::Mutex& mu, const absl::Condition& condition, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) = 0;
};

class SystemClock : public Clock {
 public:
  absl::Time Now() override { return absl::Now(); }
  bool AwaitUntil(absl::Mutex& mu, const absl::Condition& condition, absl::Time deadline) override {
    return mu.AwaitWithDeadline(condition, deadline);
  }
};

}  // namespace itwin

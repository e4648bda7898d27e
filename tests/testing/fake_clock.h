#pragma once

#include "absl/synchronization/mutex.h"
#include "common/clock.h"

namespace itwin::testing {

// Stands still until Advance. Waits end when the condition holds or the test moves the time past the deadline.
class FakeClock : public Clock {
 public:
  explicit FakeClock(absl::Time start = absl::FromUnixSeconds(1'700'000'000)) : now_(start) {}
  absl::Time Now() override {
    absl::MutexLock lock(&mu_);
    return now_;
  }
  void Advance(absl::Duration by) {
    absl::MutexLock lock(&mu_);
    now_ += by;
  }
  bool AwaitUntil(absl::Mutex& mu, const absl::Condition& condition, absl::Time deadline) override {
    // Looks again now and then: the condition is the caller's, the time is the test's.
    while (!mu.AwaitWithTimeout(condition, absl::Milliseconds(2))) {
      if (Now() >= deadline) return condition.Eval();
    }
    return true;
  }

 private:
  absl::Mutex mu_;
  absl::Time now_ ABSL_GUARDED_BY(mu_);
};

}  // namespace itwin::testing

#pragma once

#include <functional>

#include "absl/status/status.h"
#include "absl/time/time.h"

// The only place that decides whether a call is repeated.
namespace itwin::client {

enum class Idempotency { kIdempotent, kNotIdempotent };

struct RetryPolicy {
  absl::Duration initial_delay = absl::Milliseconds(100);
  absl::Duration max_delay = absl::Seconds(3);
  double multiplier = 1.8;
  absl::Duration give_up_after = absl::Seconds(15);  // no try begins later than this
  int max_exhausted = 3;  // tries that may end with kResourceExhausted: a quota does not clear in seconds
};

// Time and chance, so that tests own both. `pause` returns false when the wait was cut short: no further try.
struct Pacing {
  std::function<absl::Time()> now;
  std::function<bool(absl::Duration)> pause;
  std::function<double()> random;  // in [0, 1)
};
Pacing SystemPacing();

// Growing delays with jitter: between half of it and all of it, so that many clients do not come back at once.
class Backoff {
 public:
  Backoff(const RetryPolicy& policy, std::function<double()> random);
  absl::Duration Next();
  void Reset();

 private:
  const RetryPolicy policy_;
  const std::function<double()> random_;
  absl::Duration current_;
};

// kUnavailable, kAborted, kResourceExhausted and kDeadlineExceeded; the last only if the call is idempotent.
bool IsTransient(absl::StatusCode code, Idempotency idempotency);

using OnRetry = std::function<void(const absl::Status&, absl::Duration)>;

// Calls until success, an error that will not go away, or the end of the policy's time; returns the last status.
// A call that is not idempotent is made once.
absl::Status RetryLoop(const RetryPolicy& policy, Idempotency idempotency, const Pacing& pacing,
                       const OnRetry& on_retry, const std::function<absl::Status()>& call);

}  // namespace itwin::client

#include "client/src/retry.h"

#include <algorithm>
#include <random>

#include "absl/time/clock.h"

namespace itwin::client {

Pacing SystemPacing() {
  return {.now = [] { return absl::Now(); },
          .pause =
              [](absl::Duration delay) {
                absl::SleepFor(delay);
                return true;
              },
          .random =
              [] {
                thread_local std::mt19937 generator{std::random_device{}()};
                return std::uniform_real_distribution<double>(0, 1)(generator);
              }};
}

Backoff::Backoff(const RetryPolicy& policy, std::function<double()> random)
    : policy_(policy), random_(std::move(random)), current_(policy.initial_delay) {}

absl::Duration Backoff::Next() {
  const absl::Duration delay = current_;
  current_ = std::min(current_ * policy_.multiplier, policy_.max_delay);
  return delay * (0.5 + 0.5 * random_());
}

void Backoff::Reset() { current_ = policy_.initial_delay; }

bool IsTransient(absl::StatusCode code, Idempotency idempotency) {
  if (idempotency == Idempotency::kNotIdempotent) return false;
  return code == absl::StatusCode::kUnavailable || code == absl::StatusCode::kAborted ||
         code == absl::StatusCode::kResourceExhausted || code == absl::StatusCode::kDeadlineExceeded;
}

absl::Status RetryLoop(const RetryPolicy& policy, Idempotency idempotency, const Pacing& pacing,
                       const OnRetry& on_retry, const std::function<absl::Status()>& call) {
  const absl::Time end = pacing.now() + policy.give_up_after;
  Backoff backoff(policy, pacing.random);
  int exhausted = 0;
  while (true) {
    const absl::Status status = call();
    if (status.ok() || !IsTransient(status.code(), idempotency)) return status;
    if (status.code() == absl::StatusCode::kResourceExhausted && ++exhausted >= policy.max_exhausted) return status;
    const absl::Duration delay = backoff.Next();
    if (pacing.now() + delay > end) return status;
    if (on_retry) on_retry(status, delay);
    if (!pacing.pause(delay)) return status;
  }
}

}  // namespace itwin::client

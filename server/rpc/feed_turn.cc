#include "server/rpc/feed_turn.h"

namespace itwin::server {

bool FeedTurn::Look() {
  absl::MutexLock lock(&mu_);
  woken_ = false;
  return !cancelled_;
}

bool FeedTurn::Rest() {
  absl::MutexLock lock(&mu_);
  if (woken_ || cancelled_) return false;
  state_ = State::kResting;
  return true;
}

bool FeedTurn::Wake() {
  absl::MutexLock lock(&mu_);
  woken_ = true;
  if (state_ != State::kResting) return false;
  state_ = State::kBeingFed;
  return true;
}

bool FeedTurn::Cancel() {
  absl::MutexLock lock(&mu_);
  cancelled_ = true;
  if (state_ != State::kResting) return false;
  state_ = State::kOver;
  return true;
}

void FeedTurn::End() {
  absl::MutexLock lock(&mu_);
  state_ = State::kOver;
}

}  // namespace itwin::server

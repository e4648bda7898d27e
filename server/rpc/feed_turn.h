#pragma once

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace itwin::server {

// Who may move a watcher on. At any time it is being fed (waits for a feeder, runs on one, or has a write under way), at
// rest, or over; whoever is told `true` takes the turn, so there is never more than one, and no wake-up is lost: one
// that comes while the watcher is being fed makes it look again before it rests. Thread-safe.
class FeedTurn {
 public:
  // A look for news begins. False: the client has gone.
  bool Look() ABSL_LOCKS_EXCLUDED(mu_);
  // The look found nothing. True: the watcher rests now. False: look again.
  bool Rest() ABSL_LOCKS_EXCLUDED(mu_);
  // There may be news. True: it rested, and the caller must have it fed.
  bool Wake() ABSL_LOCKS_EXCLUDED(mu_);
  // The client has gone. True: it rested, and the caller must end it; otherwise its feeder will.
  bool Cancel() ABSL_LOCKS_EXCLUDED(mu_);
  // It is over: nobody gets the turn any more.
  void End() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  enum class State { kBeingFed, kResting, kOver };

  absl::Mutex mu_;
  State state_ ABSL_GUARDED_BY(mu_) = State::kBeingFed;
  bool woken_ ABSL_GUARDED_BY(mu_) = false;  // since the last look began
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace itwin::server
